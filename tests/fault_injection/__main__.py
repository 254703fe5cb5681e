"""Kill runs at random moments, continue them, and compare what they leave with a run that was never stopped.

    python -m tests.fault_injection                       # 20 kills of each modality or more, over all of its cases
    python -m tests.fault_injection --kills 100 --seed 1
    python -m tests.fault_injection --cases spo "bdhs, online"

A trial kills one command of a case by SIGKILL, once or several times, and continues it by the same command. Then all
files under the run's folder (weights, optimizer, average, caches left out), the logged means and the verdict are
compared bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from tests.fault_injection import trials
from tests.fault_injection.cases import MODALITIES, preload, write_models


def main(arguments: Sequence[str]) -> int:
    """Run the trials; return 1 if a run differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="kills of each modality, at least (20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (0)")
    parser.add_argument("--cases", nargs="*", metavar="NAME", help="names of cases; default: all")
    options = parser.parse_args(arguments)
    preload()
    scratch = Path(tempfile.mkdtemp(prefix="fault-injection-"))
    try:
        if (pid := os.fork()) == 0:  # the processes that are killed are forked from one that computed nothing
            write_models(scratch / "models")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, "the models could not be written"
        failures = sum(_modality(name, options, scratch) for name in MODALITIES)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 1 if failures else 0


def _modality(modality: str, options: argparse.Namespace, scratch: Path) -> int:
    """Run a modality's trials; return the number of those that differ."""
    cases = {name: case for name, case in MODALITIES[modality].items() if not options.cases or name in options.cases}
    if not cases:
        return 0
    draw, models, folder = random.Random(f"{options.seed} {modality}"), scratch / "models", scratch / "run"
    references: dict[str, dict[str, trials.Step]] = {}
    kinds, failures = Counter[tuple[str, str]](), 0
    for number, name in enumerate(cycle(cases), 1):
        if number > len(cases) and kinds.total() >= options.kills:
            break
        if name not in references:
            references[name] = trials.whole(cases[name], models, folder)
        trial = trials.trial(cases[name], models, folder, references[name], draw)
        kinds.update((command, kill.kind) for command, kill in trial.kills)
        said = ", ".join(f"{command} at {kill.kind} {kill.number:.6g}" for command, kill in trial.kills)
        verdict = f"DIFFERS: {'; '.join(trial.differs)}" if trial.differs else "same bits"
        print(f"{modality} {number:3}  {name:24} {said or 'ended before'}: {verdict}", flush=True)
        failures += bool(trial.differs)
    print(
        f"{modality}: {number - 1} trials of {len(cases)} cases, {kinds.total()} kills, {failures} differ", flush=True
    )
    counts = ", ".join(f"{command} at {kind} {count}" for (command, kind), count in sorted(kinds.items()))
    print(f"{modality}: kills of {counts}", flush=True)
    return failures


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
    sys.exit(main(sys.argv[1:]))
