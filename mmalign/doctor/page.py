"""HTML page of a report: one file with the pictures and texts of the first places of each finding."""

from __future__ import annotations

from pathlib import Path

from mmalign.atomic_io import atomic_write
from mmalign.data.images import BadImage, decode
from mmalign.data.pairs import ImageRef
from mmalign.doctor.findings import Finding, Place
from mmalign.doctor.report import Report
from mmalign.pages.grid import SMALL
from mmalign.pages.page import data_uri, render

_SHOWN = 12  # places of a finding
_CHARACTERS = 2000  # of a text; a page shows eight lines


def write(file: Path, report: Report) -> None:
    """Write the page of a report.

    Raises:
        OSError: the file cannot be written.
    """
    number = len(report.problems)
    page = render(
        "findings.html.jinja",
        title=f"Data doctor: {report.source}",
        lead=f"{report.rows}. {number} of {len(report.findings)} checks found defects.",
        sections=[_section(finding) for finding in report.problems],
        clean=report.clean,
        not_checked=[(one.check.name, one.not_checked) for one in report.findings if one.not_checked],
    )
    with atomic_write(file) as part:
        part.write_bytes(page.encode("utf-8", "replace"))


def _section(finding: Finding) -> dict[str, object]:
    check, number = finding.check, len(finding.places)
    return {
        "name": check.name,
        "level": check.level,
        "title": check.title,
        "advice": check.advice,
        "number": f"{number:,}",
        "hidden": f"{number - _SHOWN:,}" if number > _SHOWN else "",
        "places": [_place(place) for place in finding.places[:_SHOWN]],
    }


def _place(place: Place) -> dict[str, object]:
    images = [_image(name, ref) for name, ref in place.images]
    return {
        "location": place.location,
        "detail": place.detail,
        "images": [image for image in images if image is not None],
        "texts": [(name, text[:_CHARACTERS]) for name, text in place.texts],
    }


def _image(name: str, ref: ImageRef) -> dict[str, object] | None:
    """Return an image's variables for the template; None if it cannot be read."""
    try:
        image = decode(ref)
    except BadImage:
        return None
    width, height = image.size
    return {"name": name, "uri": data_uri(image), "width": width, "height": height, "small": max(image.size) <= SMALL}
