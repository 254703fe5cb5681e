"""HTML page of a report: one file with the pictures and texts of the first places of each finding."""

from __future__ import annotations

import contextlib
from pathlib import Path

from mmalign.data.images import BadImage, decode
from mmalign.doctor.findings import Finding, Place
from mmalign.doctor.report import Report
from mmalign.pages.page import image_variables, write_html

_SHOWN = 12  # places of a finding
_CHARACTERS = 2000  # of a text; a page shows eight lines


def write(file: Path, report: Report) -> None:
    """Write the page of a report.

    Raises:
        CheckpointError: the file cannot be written.
    """
    number = len(report.problems)
    write_html(
        file,
        "findings.html.jinja",
        title=f"Data doctor: {report.source}",
        lead=f"{report.rows}. {number} of {len(report.findings)} checks found defects.",
        sections=[_section(finding) for finding in report.problems],
        clean=report.clean,
        not_checked=[(one.check.name, one.not_checked) for one in report.findings if one.not_checked],
    )


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
    # Images that cannot be read are left out
    images = []
    for name, ref in place.images:
        with contextlib.suppress(BadImage):
            images.append(image_variables(name, decode(ref)))
    return {
        "location": place.location,
        "detail": place.detail,
        "images": images,
        "texts": [(name, text[:_CHARACTERS]) for name, text in place.texts],
    }
