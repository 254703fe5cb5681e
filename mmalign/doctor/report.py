"""Reports of an examination: lines for a terminal, JSON, and an exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmalign.atomic_io import write_json
from mmalign.doctor.checks import CHECKS
from mmalign.doctor.corpus import Corpus, NotChecked
from mmalign.doctor.findings import Finding

FailOn = Literal["error", "warning", "none"]
_SHOWN = 3  # places of a check in the terminal


@dataclass(frozen=True)
class Report:
    """Findings of all checks of a corpus.

    Attributes:
        source: the recipe or the files.
        rows: the number of rows in words, by split.
        findings: the result of every check that applies, in order.
    """

    source: str
    rows: str
    findings: Sequence[Finding]

    @property
    def problems(self) -> list[Finding]:
        """The findings with places, errors first."""
        return sorted((finding for finding in self.findings if finding.places), key=lambda finding: finding.check.level)

    @property
    def clean(self) -> list[str]:
        """The names of the checks that ran and found nothing."""
        return [finding.check.name for finding in self.findings if not finding.places and not finding.not_checked]

    def exit_code(self, fail_on: FailOn) -> int:
        """Return 1 if a finding has the level `fail_on` or a higher one, else 0."""
        levels = {"none": (), "warning": ("error", "warning"), "error": ("error",)}[fail_on]
        return int(any(finding.check.level in levels for finding in self.problems))

    def lines(self) -> list[str]:
        """Return the report as lines of text: counts, places, what to do."""
        lines = [f"{self.rows} from {self.source}"]
        for finding in self.problems:
            check, number = finding.check, len(finding.places)
            lines.append(f"{check.level}: {check.name} ({number:,}): {check.title}")
            lines += [f"  {place.location}: {place.detail}" for place in finding.places[:_SHOWN]]
            lines += [f"  and {number - _SHOWN:,} more"] if number > _SHOWN else []
            lines.append(f"  {check.advice}")
        if self.clean:
            lines.append(f"nothing found: {', '.join(self.clean)}")
        lines += [
            f"not checked: {finding.check.name}: {finding.not_checked}"
            for finding in self.findings
            if finding.not_checked
        ]
        return lines

    def write_json(self, file: Path) -> None:
        """Write all places of all findings."""
        content = {
            "source": self.source,
            "rows": self.rows,
            "checks": [
                {
                    "name": one.check.name,
                    "level": one.check.level,
                    "title": one.check.title,
                    "status": "not checked" if one.not_checked else "found" if one.places else "clean",
                    "reason": one.not_checked,
                    "number": len(one.places),
                    "advice": one.check.advice,
                    "places": [
                        {"location": place.location, "detail": place.detail, "texts": dict(place.texts)}
                        for place in one.places
                    ],
                }
                for one in self.findings
            ],
        }
        write_json(file, content)


def examine(corpus: Corpus, source: str, ignore: Collection[str] = ()) -> Report:
    """Run all checks that apply to a corpus, except those to ignore."""
    findings = []
    for check in CHECKS:
        if corpus.kind not in check.kinds or check.name in ignore:
            continue
        result = check.find(corpus)
        findings.append(Finding(check, (), result.reason) if isinstance(result, NotChecked) else Finding(check, result))
    counts = Counter(one.split for one in (corpus.cases or corpus.prompts))
    rows = " and ".join(f"{number:,} {corpus.kind} ({split})" for split, number in counts.items())
    return Report(source, rows, findings)
