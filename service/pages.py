"""The page at `/`, and that of the API at `/docs`: a few files, which ask nothing of any address but this service's."""

from importlib import resources
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

from service.errors import ServiceError, shown

FOLDER = Path(__file__).parent / "web"
# Swagger UI, of which FastAPI's own page would ask a public server. Of that package only these files are used.
SWAGGER = Path(str(resources.files("fastapi_swagger"))) / "resources"
FILES = {path.name: path for path in (*FOLDER.iterdir(), SWAGGER / "swagger-ui-bundle.js", SWAGGER / "swagger-ui.css")}
HEADERS = {
    # Blobs are the pictures that were chosen, data the signs of Swagger UI; no other origin, no inline script or style,
    # no frame around the page.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # files of one release never meet those of another
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def home() -> FileResponse:
    return FileResponse(FOLDER / "index.html", headers=HEADERS)


@router.get("/docs")
async def docs() -> FileResponse:
    return FileResponse(FOLDER / "docs.html", headers=HEADERS)


@router.get("/web/{name}")
async def web_file(name: str) -> FileResponse:
    if name not in FILES:  # no path is made of what a client sends
        raise ServiceError("not_found", f"there is no {shown('/web/' + name)}.")
    return FileResponse(FILES[name], headers=HEADERS)
