"""The flags that say how an input is read, where its names alone do not."""

from dataclasses import asdict, dataclass, field

from data_tools.errors import ConfigError
from data_tools.files import SINCE
from data_tools.sources.sample_labels import is_label_text

CLASS_SOURCES = ("folder", "path", "tar", "none")


@dataclass(frozen=True)
class Reading:
    """What the flags say; "" where the input decides."""

    # What names an image's class: the first folder of its path, its whole folder, its tar, nothing.
    class_from: str = field(default="", metadata={SINCE: 3})
    # Of the images in tars, after KEY and a dot, where the name is cut at its first dot.
    image_suffix: str = field(default="", metadata={SINCE: 3})
    # Of the labels in tars, or json:FIELD.
    label_suffix: str = field(default="", metadata={SINCE: 3})
    # Of a data set by Hugging Face.
    label_column: str = field(default="", metadata={SINCE: 3})

    def __post_init__(self) -> None:
        if self.label_suffix and not is_label_text(self.label_suffix):
            raise ConfigError(
                f"--label-suffix {self.label_suffix}: is no suffix; write what stands after KEY "
                "and a dot, such as output.cls, or json:FIELD."
            )
        if self.label_suffix and self.class_from:
            raise ConfigError(
                f"--label-suffix {self.label_suffix}: names the classes, and so does --class-from "
                f"{self.class_from}; leave one of them out."
            )

    def refuse_others(self, text: str, kind: str, *known: str) -> None:
        """Refuse flags that say nothing about this kind of input.

        Args:
            text: the input as typed.
            kind: what it is, such as "a list".
            known: fields that it knows.
        """
        for name, value in asdict(self).items():
            if value and name not in known:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {value}: --input {text} is {kind}, which it does "
                    "not serve; leave it out."
                )
