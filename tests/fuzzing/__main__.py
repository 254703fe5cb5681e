"""Fuzz every reader of files that others wrote: python -m tests.fuzzing --examples 100000.

Every input must be read, or end in one sentence of mmalign that names the place, in bounded time and memory. The
program prints what broke this rule, and a table of counts; its exit code is the number of readers that broke it.

With `--engine atheris`, libFuzzer changes the files of one reader where that reaches new code of mmalign, and stops at
the first input that breaks the rule: python -m tests.fuzzing --engine atheris --only trained.json
"""

import argparse
import logging
import os
import resource
import sys
import tempfile
import time
import traceback

CHUNK = 2000  # inputs of one seed
MEMORY = 8 * 2**30  # bytes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000, help="inputs of all readers together")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first inputs")
    parser.add_argument("--only", default="", help="a part of the names of the readers to fuzz")
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis", help="source of inputs")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(HF_DATASETS_CACHE=cache, HF_DATASETS_DISABLE_PROGRESS_BARS="1")
        if options.engine == "atheris":
            from tests.fuzzing.coverage import fuzz_by_coverage

            return fuzz_by_coverage(options.only, options.examples, options.seed)
        return fuzz_all(options.examples, options.seed, options.only)


def fuzz_all(examples: int, first_seed: int, only: str) -> int:
    """Fuzz the readers, print the counts, and return how many readers broke the rule."""
    from tests.fuzzing.suite import READERS, fuzz

    readers = [reader for reader in READERS if only in reader.name]
    shares, broken, total = sum(reader.share for reader in readers), 0, [0, 0]
    print(f"{'reader':32} {'inputs':>8} {'refused':>8} {'CPU s':>6}", flush=True)
    for reader in readers:
        number, counts, started, word = -(-examples * reader.share // shares), [0, 0], time.process_time(), ""
        for index, start in enumerate(range(0, number, CHUNK)):
            try:
                read, refused = fuzz(reader, min(CHUNK, number - start), seed_number=first_seed + index, shrink=False)
            except Exception:
                broken, word = broken + 1, "BROKE THE RULE"
                traceback.print_exc(file=sys.stdout)
                break
            counts = [counts[0] + read, counts[1] + refused]
        total = [total[0] + counts[0], total[1] + counts[1]]
        seconds = time.process_time() - started
        print(f"{reader.name:32} {counts[0]:8,} {counts[1]:8,} {seconds:6.0f} {word}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{'all':32} {total[0]:8,} {total[1]:8,}; {peak:,} MB of memory at most; {broken} readers broke the rule")
    return broken


if __name__ == "__main__":
    sys.exit(main())
