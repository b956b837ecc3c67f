"""From a request's body to the uploaded files: a multipart form, or one image as it is."""

import unicodedata
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from service.errors import ServiceError, shown

FIELD = "files"
MAX_FILENAME_CHARACTERS = 255
UNSAFE_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}  # controls, surrogates, line and paragraph separators


@dataclass(frozen=True)
class Upload:
    filename: str | None  # None: a raw body
    data: bytes


async def read_uploads(request: Request, *, max_files: int) -> list[Upload]:
    """At least one upload, in the order of the form. Raises ServiceError."""
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        return await _form_uploads(request, max_files)
    if media_type.startswith("image/"):
        return [Upload(filename=None, data=await request.body())]
    raise ServiceError(
        "unsupported_media_type",
        f"the Content-Type is {shown(content_type)}: allowed are multipart/form-data, with parts named {FIELD}, "
        "and image/*, with one image as the body.",
    )


class _WholeForm(MultiPartParser):
    """Refuses a form of too many parts, or one that breaks off: the parser alone would drop the last part."""

    spool_max_size = 0  # keep files in memory, where the limit of the body bounds them; a disk takes twice the time

    def __init__(self, request: Request, *, max_parts: int) -> None:
        super().__init__(request.headers, self._until_end(request), max_files=max_parts, max_fields=max_parts)
        self._max_parts = max_parts
        self._parts = 0
        self._ended = False

    def on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > self._max_parts:
            raise ServiceError("too_many_files", f"the form has too many parts: allowed are {self._max_parts}.")
        super().on_part_begin()

    def on_end(self) -> None:
        self._ended = True

    async def _until_end(self, request: Request) -> AsyncGenerator[bytes, None]:
        async for chunk in request.stream():
            yield chunk
        # By now the parser has read the last chunk. Raised from here, it closes the files that it has begun.
        if not self._ended:
            raise MultiPartException("it ends without its closing boundary.")


async def _form_uploads(request: Request, max_files: int) -> list[Upload]:
    try:
        form = await _WholeForm(request, max_parts=max_files).parse()
    except MultiPartException as error:
        raise ServiceError("malformed_request", f"the form cannot be read: {error.message}") from error
    except UnicodeError as error:  # of the charset that the Content-Type names
        raise ServiceError("malformed_request", "the form cannot be read: its charset does not fit it.") from error
    try:
        uploads = [await _upload(name, part) for name, part in form.multi_items()]
    finally:
        await form.close()
    if not uploads:
        raise ServiceError("no_files", f"the form has no file: at least one part named {FIELD} is needed.")
    return uploads


async def _upload(name: str, part: UploadFile | str) -> Upload:
    if name != FIELD:
        raise ServiceError("unknown_field", f"the form has a part named {shown(name)}: allowed is {FIELD}.")
    if isinstance(part, str):
        raise ServiceError("not_a_file", f"a part named {FIELD} is text: allowed are files, with a filename.")
    return Upload(filename=_safe(part.filename or ""), data=await part.read())


def _safe(filename: str) -> str:
    """A name to be echoed: no line ends, no terminal codes, no lone surrogates, and not without end."""
    kept = filename[:MAX_FILENAME_CHARACTERS]
    return "".join("\ufffd" if unicodedata.category(letter) in UNSAFE_CATEGORIES else letter for letter in kept)
