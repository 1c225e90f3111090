"""`make cuda-check`: builds for the GPU of this machine, tests there, and measures. One run, a table at the end.

    python tests/cuda_check.py [--build build/cuda] [--shape qwen3-4b] [-- CMake options]

1. builds llama.cpp with the operator for this GPU alone, without flash attention (which takes most of a build's time);
2. runs the operator's tests on it, plain and under compute-sanitizer's memcheck and racecheck where that is installed;
3. runs the golden cases, memory files, several sequences and the CUDA graph test (tests/test_cuda.py);
4. times decode and a prompt of 2,048 tokens with and without the memory, F16 and Q4_K_M (`deltamem bench`);
5. counts kernel launches per token with and without, and the time of our kernels, where nsys is installed.

All that it prints lies in BUILD/report too. Exits with 1 if a test failed or there is no GPU; times do not count.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Check:
    def __init__(self, build: Path):
        self.build, self.report, self.failed = build, build / "report", []
        self.report.mkdir(parents=True, exist_ok=True)
        self.rows: list[tuple[str, str]] = []

    def run(self, name: str, *command: object, timeout: float | None = None, **environment: str) -> str | None:
        """Runs a command; its output goes to the report. Returns it, or None if the command failed."""
        print(f"{name} ...", flush=True)
        begun = time.monotonic()
        path = self.report / f"{name}.txt"
        with open(path, "w", encoding="utf-8") as file:
            try:
                status = subprocess.run(
                    [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=timeout,
                    env={**os.environ, **environment},
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                status = f"not done after {timeout:.0f} s"
        seconds = time.monotonic() - begun
        self.rows.append((name, f"{'ok' if status == 0 else f'FAILED ({status})'}, {seconds:.0f} s"))
        if status != 0:
            self.failed.append(name)
            print("".join(path.read_text(encoding="utf-8", errors="replace").splitlines(True)[-30:]))
            return None
        return path.read_text(encoding="utf-8", errors="replace")

    def note(self, name: str, text: str) -> None:
        self.rows.append((name, text))


def decode(model: str, adapter: str, n_tokens: int) -> None:
    """What profile() runs under nsys: a short prompt, then token by token."""
    from pydeltamem import DeltaMemLlama

    llm = DeltaMemLlama(model_path=model, deltamem_path=adapter or None, n_gpu_layers=-1, n_ctx=512, verbose=False)
    llm.eval(list(range(100, 108)))
    for token in range(n_tokens):
        llm.eval([100 + token])
    llm.close()


def kernels_of(stats: str) -> dict[str, tuple[int, float]]:
    """Instances and nanoseconds of each kernel, from the CSV of nsys's cuda_gpu_kern_sum."""
    lines = stats.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("Time (%)"))
    rows = csv.DictReader(lines[begin:])
    return {row["Name"]: (int(row["Instances"]), float(row["Total Time (ns)"])) for row in rows if row.get("Instances")}


def profile(check: Check, model: str, adapter: str, environment: dict[str, str]) -> None:
    """Launches per token, with and without, from two lengths each; and how long each of our kernels takes."""
    if not shutil.which("nsys"):
        check.note("launches per token", "nsys is not installed: not counted")
        return
    per_token = {}
    for side, path in (("without", ""), ("with", adapter)):
        kernels = []
        for n in (16, 48):
            trace = check.report / f"nsys-{side}-{n}"
            command = ["nsys", "profile", "--cuda-graph-trace=node", "-t", "cuda", "-f", "true", "-o", trace]
            command += [sys.executable, __file__, "--decode", model, path, n]
            if check.run(trace.name, *command, timeout=300, **environment) is None:
                return
            stats = ["nsys", "stats", "-q", "-r", "cuda_gpu_kern_sum", "-f", "csv", f"{trace}.nsys-rep"]
            text = check.run(f"{trace.name}-stats", *stats)
            if text is None:
                return
            kernels.append(kernels_of(text))
        short, long = (sum(instances for instances, _ in of.values()) for of in kernels)
        per_token[side] = (long - short) / 32
    check.note("launches per token", f"{per_token['without']:.1f} without, {per_token['with']:.1f} with the memory")
    for name, (instances, nanoseconds) in kernels[1].items():
        if "deltamem::" in name:
            check.note(f"  {name.split('(')[0][-60:]}", f"{nanoseconds / instances / 1000:.2f} µs, {instances} times")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda")
    parser.add_argument("--shape", default="qwen3-4b")
    parser.add_argument("--decode", nargs=3, metavar=("MODEL", "ADAPTER", "N"), help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="for CMake, after --")
    args = parser.parse_args()
    if args.decode:
        decode(args.decode[0], args.decode[1], int(args.decode[2]))
        return 0
    python = sys.executable

    if not shutil.which("nvidia-smi") or subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode != 0:
        print("cuda-check: nvidia-smi finds no GPU here: run it on a machine that has one")
        return 1

    build = args.build.resolve()
    check = Check(build)
    check.run("gpu", "nvidia-smi")
    configured = check.run(
        "configure", "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={python}",
        "-DDELTAMEM_BUILD_TESTS=ON", "-DGGML_CUDA=ON", "-DGGML_CUDA_FA=OFF", "-DGGML_CUDA_NO_VMM=ON",
        "-DCMAKE_CUDA_ARCHITECTURES=native", *args.options,
    )  # fmt: skip
    if configured is None or check.run("build", "cmake", "--build", build) is None:
        return summary(check)

    test_op = build / "bin" / "test-op"
    check.run("operator", test_op, "gpu", timeout=300)
    for tool in ("memcheck", "racecheck"):
        if shutil.which("compute-sanitizer"):
            check.run(tool, "compute-sanitizer", "--tool", tool, "--error-exitcode", "3", test_op, "gpu", timeout=600)
        else:
            check.note(tool, "compute-sanitizer is not installed: not run")

    environment = {"LLAMA_CPP_LIB_PATH": str(build / "bin")}
    check.run("golden", python, "-m", "pytest", "-q", "-s", "tests/test_cuda.py", timeout=600, **environment)

    for ftype in ("f16", "q4_k_m"):
        path = check.report / f"bench-{ftype}.json"
        command = ["bench", "--synthetic", args.shape, "--ftype", ftype, "-p", 2048, "-n", 64, "-b", 2048]
        command += ["--pairs", 10, "--rss", 0, "--json", path]
        if check.run(f"bench-{ftype}", python, "-m", "pydeltamem.cli", *command, timeout=900, **environment) is None:
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        for what in ("decode", "prefill"):
            r = found[what]
            check.note(f"  {args.shape} {ftype}, {what}", f"{r['ratio']:.4f} × ({r['low']:.4f} to {r['high']:.4f})")
        if ftype == "q4_k_m":
            profile(check, found["setup"]["model"], found["setup"]["deltamem"], environment)
    return summary(check)


def summary(check: Check) -> int:
    text = "\n".join(f"{name:<48} {result}" for name, result in check.rows)
    (check.report / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nreport: {check.report}")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
