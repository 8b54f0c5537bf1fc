"""The names of image files: which extensions are taken for images."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")


def is_image(extension: str) -> bool:
    """Return whether a member with this extension is an image."""
    return extension in IMAGE_EXTENSIONS
