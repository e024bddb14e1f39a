"""Read and write image sets as ADM's npz files: arr_0 uint8 (N, H, W, 3), arr_1 labels.

A file may hold statistics, too. Files are read and written piece by piece: 50,000 images of 256
pixels are 9.8 GB. The bytes that are written depend on the arrays alone.
"""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from data_tools.errors import ConfigError
from data_tools.files import replace_file

IMAGES, LABELS = "arr_0", "arr_1"
_OLDEST_TIME = (1980, 1, 1, 0, 0, 0)  # that a zip can hold; the real one would change the bytes


class ImageNpz:
    """A file that is read.

    Attributes:
        path: of the file.
        num_images: N, 0 if it holds no images.
        image_size: (H, W), None if it holds no images.
    """

    def __init__(self, path: Path, flag: str) -> None:
        """Look at the file's headers.

        Args:
            path: of the file.
            flag: that named it, for messages.
        """
        self.path, self._flag = path, f"{flag} {path}".strip()
        self.num_images, self.image_size = 0, None
        if not path.is_file():
            raise ConfigError(f"{self._flag}: there is no such file; give an npz file.")
        with self._opened() as archive:
            self.names = {name.removesuffix(".npy") for name in archive.namelist()}
            if IMAGES in self.names:
                with archive.open(f"{IMAGES}.npy") as file:
                    shape, is_fortran, dtype = _read_header(file)
                if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or is_fortran:
                    raise ConfigError(
                        f"{self._flag}: its {IMAGES} is {dtype} {shape}; images are uint8 "
                        "(N, height, width, 3)."
                    )
                self.num_images, self.image_size = shape[0], shape[1:3]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Go through the images, uint8 (up to `size`, H, W, 3)."""
        assert self.image_size is not None, "no images"
        stride = self.image_size[0] * self.image_size[1] * 3
        with self._opened() as archive, archive.open(f"{IMAGES}.npy") as file:
            _read_header(file)
            for start in range(0, self.num_images, size):
                count = min(size, self.num_images - start)
                data = file.read(count * stride)
                if len(data) < count * stride:
                    raise ConfigError(f"{self._flag}: ends too early; fetch or draw it again.")
                yield np.frombuffer(data, np.uint8).reshape(count, *self.image_size, 3)

    def array(self, name: str) -> np.ndarray:
        """Read one array whole."""
        with self._opened() as archive, archive.open(f"{name}.npy") as file:
            return npy.read_array(file)

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as err:
            raise ConfigError(
                f"{self._flag}: is damaged or no npz file ({err}); fetch or draw it again."
            ) from err


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    return read(file)


def write_npz(
    path: Path,
    images: Iterable[np.ndarray],
    shape: tuple[int, int, int, int],
    arrays: dict[str, np.ndarray],
) -> None:
    """Write a file whole or not at all.

    Args:
        path: of the file.
        images: pieces of arr_0, uint8 (n, H, W, 3).
        shape: of arr_0 whole, (N, H, W, 3).
        arrays: the others.
    """

    def write(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with _member(archive, IMAGES) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                npy.write_array_header_1_0(member, header)
                count = 0
                for piece in images:
                    assert piece.dtype == np.uint8 and piece.shape[1:] == shape[1:], piece.shape
                    member.write(memoryview(np.ascontiguousarray(piece)).cast("B"))
                    count += len(piece)
                assert count == shape[0], f"{count} images instead of {shape[0]}"
            for name, array in arrays.items():
                with _member(archive, name) as member:
                    npy.write_array(member, np.asarray(array, order="C"), allow_pickle=False)

    replace_file(path, write)


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    return archive.open(zipfile.ZipInfo(f"{name}.npy", _OLDEST_TIME), "w", force_zip64=True)
