"""The extensions of image files: which files and members of tars are taken for images."""

from __future__ import annotations

from PIL import Image, ImageFile

# If a sample has several images, training reads the one whose extension comes first.
_COMMON = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
# Documents, films and metadata: they are not still images, or need another program to be read.
_NO_STILLS = ("PDF", "EPS", "MPEG", "FLI", "IPTC")


def _pillow_s() -> list[str]:
    """Return the extensions of the still images that the installed Pillow decodes."""
    Image.preinit()  # before init: Image.open tries the formats in this order, and common ones should be first
    Image.init()
    readable = {name for name, (factory, _) in Image.OPEN.items() if not _is_stub(factory)}
    readable = {*readable, "MPO"} - {*_NO_STILLS}  # Pillow's JPEG plug-in opens MPO
    return sorted(text.lstrip(".") for text, name in Image.registered_extensions().items() if name in readable)


def _is_stub(factory: object) -> bool:
    """Return whether Pillow knows the format, but cannot decode it without a handler of the application."""
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


IMAGE_EXTENSIONS = tuple(dict.fromkeys([*_COMMON, *_pillow_s()]))
LOOKED_FOR = f"looked for {', '.join(_COMMON)} and {len(IMAGE_EXTENSIONS) - len(_COMMON)} more that Pillow reads"


def is_image(extension: str) -> bool:
    """Return whether a file or member with this extension, in lower case and without its dot, is an image."""
    return extension in IMAGE_EXTENSIONS
