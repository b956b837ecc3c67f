"""The page at `/`: a few files, which ask nothing of any address but this service's."""

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

from service.errors import ServiceError, shown

FOLDER = Path(__file__).parent / "web"
HEADERS = {
    # Blobs are the pictures that were chosen; no other origin, no inline script or style, no frame around the page.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # files of one release never meet those of another
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def home() -> FileResponse:
    return FileResponse(FOLDER / "index.html", headers=HEADERS)


@router.get("/web/{name}")
async def web_file(name: str) -> FileResponse:
    files = {path.name: path for path in FOLDER.iterdir()}  # no path is made of what a client sends
    if name not in files:
        raise ServiceError("not_found", f"there is no {shown('/web/' + name)}.")
    return FileResponse(files[name], headers=HEADERS)
