"""Every error that Hazelnut raises on purpose. Each message is one sentence for the person who caused it.

HazelnutError
├── ImageError                  has `code`, the word that the service and the command line report
│   ├── ImageEmptyError         image_empty        no bytes
│   ├── ImageFormatError        image_format       not one of PNG, JPEG, WebP, BMP, TIFF
│   ├── ImageTruncatedError     image_truncated    the file ends before its image does
│   ├── ImageCorruptError       image_corrupt      a checksum, a length or the coded data is wrong
│   ├── ImageAnimatedError      image_animated     more than one frame or page
│   ├── ImageTooLargeError      image_too_large    more pixels than the limit
│   ├── ImageModeError          image_mode         a pixel type without a rule (32-bit float, say)
│   ├── ImageUnreadableError    image_unreadable   decoding it crashes, or takes too long or too much memory
│   └── ImageFailedError        image_failed       scoring it failed, and not for want of the others
├── CheckpointError             a checkpoint that cannot be read, or is not what it says
├── CalibrationError            too few good images, or an alpha that their number cannot resolve
├── ConfigError                 a value that a configuration does not allow
├── DataError                   a folder of images that cannot be trained on or evaluated
└── TrainingError               training cannot start, go on or be resumed
    └── TrainingDivergedError   a loss is not finite
"""


class HazelnutError(Exception):
    """Base of all errors that are the user's to act on; the command line prints them without a traceback."""


class ImageError(HazelnutError):
    """An image that is not scored. `code` is stable: clients may branch on it."""

    code = "image"


class ImageEmptyError(ImageError):
    code = "image_empty"


class ImageFormatError(ImageError):
    code = "image_format"


class ImageTruncatedError(ImageError):
    code = "image_truncated"


class ImageCorruptError(ImageError):
    code = "image_corrupt"


class ImageAnimatedError(ImageError):
    code = "image_animated"


class ImageTooLargeError(ImageError):
    code = "image_too_large"


class ImageModeError(ImageError):
    code = "image_mode"


class ImageUnreadableError(ImageError):
    code = "image_unreadable"


class ImageFailedError(ImageError):
    code = "image_failed"


class CheckpointError(HazelnutError):
    pass


class CalibrationError(HazelnutError):
    pass


class ConfigError(HazelnutError):
    pass


class DataError(HazelnutError):
    pass


class TrainingError(HazelnutError):
    pass


class TrainingDivergedError(TrainingError):
    pass
