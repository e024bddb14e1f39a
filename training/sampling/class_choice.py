"""Which class a name or a number means: one rule for every command and for exported pipelines.

A text is a name first, and the number of a class only if no class has that name. A text that is
the name of one class and the number of another is refused: whoever types "2" for a data set with
folders 0 to 11 may mean either. Numbers that are no texts, as Python has them, are always numbers.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from training.config.wording import did_you_mean, shown
from training.sampling.checks import WrongValueError, whole_number

NAMES_SHOWN = 10
LONGEST_NAME = 200  # of a name that is compared with others


class ClassChoice:
    """Finds classes by name or number.

    Args:
        num_classes: of the model; 0 = it has none, and none is found.
        names: by number; some may be missing, and two classes may have one name.
        call: what the user calls the choice, such as "--classes"; it begins every sentence.
        by_number: how the user forces a number, such as "--class-numbers {}".
    """

    def __init__(
        self, num_classes: int, names: Mapping[int, str], call: str, by_number: str
    ) -> None:
        self.num_classes, self.names = num_classes, dict(names)
        self._call, self._by_number = call, by_number
        self._numbers: dict[str, list[int]] = {}  # two spellings of one character are one
        for index, name in sorted(self.names.items()):
            self._numbers.setdefault(_normal(name), []).append(index)

    def name_of(self, index: int) -> str:
        """Return a class's name for people."""
        return self.names.get(index, f"class {index}")

    def find(self, given: Any) -> int:
        """Return the number of a class that is given by its name or number.

        Raises:
            WrongValueError: there is no such class, or more than one could be meant.
        """
        if self.num_classes == 0:
            raise WrongValueError(f"{self._call}: this model was trained without classes.")
        return self._named(given) if isinstance(given, str) else self._numbered(given)

    def find_all(self, text: str) -> list[int]:
        """Find classes separated by commas, of which a name may have some itself.

        Raises:
            WrongValueError: see `find`; also a list that can be read in two ways.
        """
        parts, found, start = text.split(","), [], 0
        while start < len(parts):
            end = self._end_of_name(parts, start)
            name = ",".join(parts[start:end]).strip()
            if end - start > 1 and all(self._is_known(part) for part in parts[start:end]):
                raise WrongValueError(
                    f"{self._call}: {name!r} is the name of one class and a list of others; give "
                    f"{self._forced(self._numbers[_normal(name)])} for the one."
                )
            found.append(self._named(name))
            start = end
        return found

    def numbers_in(self, text: str) -> list[int]:
        """Find classes by numbers separated by commas, whatever they are called."""
        return [self._numbered(self._digits(part.strip())) for part in text.split(",")]

    def _end_of_name(self, parts: list[str], start: int) -> int:
        """Return where the longest name that begins at a part ends; one part if none does."""
        longest = 1 + max((name.count(",") for name in self._numbers), default=0)
        for end in range(min(len(parts), start + longest), start, -1):
            if _normal(",".join(parts[start:end])) in self._numbers:
                return end
        return start + 1

    def _is_known(self, text: str) -> bool:
        return _normal(text) in self._numbers or self._number_of(text.strip()) is not None

    def _number_of(self, text: str) -> int | None:
        """Return the class whose number a text is, if there is one."""
        is_number = text.isascii() and text.isdigit() and len(text) <= len(str(self.num_classes))
        return int(text) if is_number and int(text) < self.num_classes else None

    def _digits(self, text: str) -> int:
        number = self._number_of(text)
        if number is None:
            raise WrongValueError(f"{self._call}: {shown(text)} is not {self._range()}.")
        return number

    def _range(self) -> str:
        return f"a number of a class, from 0 to {self.num_classes - 1}"

    def _named(self, text: str) -> int:
        named, number = self._numbers.get(_normal(text), []), self._number_of(text.strip())
        if len(named) > 1:
            raise WrongValueError(
                f"{self._call}: {len(named)} classes are called {text!r}; give "
                f"{self._forced(named)}."
            )
        if named and number not in (None, named[0]):
            other = self.names.get(number)
            called = "" if other is None else f", {other!r}"
            raise WrongValueError(
                f"{self._call}: {text!r} is the name of class {named[0]} and the number of another"
                f"{called}; give {self._forced(named)} for the one or {self._forced([number])} for "
                "the other."
            )
        if named:
            return named[0]
        if number is None:
            raise WrongValueError(f"{self._call}: unknown class {shown(text)}{self._advice(text)}")
        return number

    def _numbered(self, given: Any) -> int:
        index = whole_number(given, f"{self._call}: a class that is not given by its name")
        if not 0 <= index < self.num_classes:
            raise WrongValueError(f"{self._call}: {index} is not {self._range()}.")
        return index

    def _forced(self, numbers: Iterable[int]) -> str:
        return " or ".join(self._by_number.format(number) for number in list(numbers)[:NAMES_SHOWN])

    def _advice(self, text: str) -> str:
        names = [repr(name) for _, name in sorted(self.names.items())]
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        listed = f", or a name: {', '.join(names[:NAMES_SHOWN])}{more}" if names else ""
        otherwise = f"; give {self._range()}{listed}."
        return did_you_mean(_normal(text)[:LONGEST_NAME], self.names.values(), otherwise)


def _normal(name: str) -> str:
    """Return a name as it is compared: composed characters, no blanks around."""
    return unicodedata.normalize("NFC", name).strip()
