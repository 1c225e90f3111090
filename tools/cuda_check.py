"""`make cuda-check`: builds for the GPU of this machine, tests there, and measures. One run, a table at the end.

    python tools/cuda_check.py [--build build/cuda] [--shape qwen3-4b] [--minutes 10] [-- CMake options]

1. builds llama.cpp with the operator for this GPU alone, without flash attention (which takes most of a build's time),
   and with cuBLAS from pip where the toolkit has none; the random models of step 4 are written meanwhile, or from then
   on where our package was not built (`make cuda-bundle`);
2. runs the operator's tests on it, plain and under compute-sanitizer's memcheck and racecheck where that is installed;
3. runs the golden cases, memory files, several sequences and the CUDA graph test (tests/test_cuda.py), with products of
   float32 as such, not as TF32;
4. times decode and a prompt of 2,048 tokens with and without the memory, F16 and Q4_K_M (`deltamem bench`);
5. counts kernel launches per token with and without, and the time of our kernels and their floors, by nsys or, where
   that is not installed, by ncu;
6. runs the golden cases with TF32.

It ends after --minutes; the next run continues with the existing build. BUILD/report holds all that it prints, and the
table from the first step on. Exits with 1 if there is no GPU, or if a test failed, was skipped or was not reached;
times and profilers do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT / "cmake"))
import fetch_llama_cpp  # noqa: E402

SOURCES = (ROOT / "build" / "native" / "download" / fetch_llama_cpp.SDIST, ROOT / "llama.cpp")
PROMPT = 8  # tokens of decode()'s prompt


class Check:
    """The steps and their results. No step runs longer than until `seconds` from now."""

    def __init__(self, build: Path, seconds: float = 600):
        self.build, self.report, self.failed = build, build / "report", []
        self.report.mkdir(parents=True, exist_ok=True)
        self.rows: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.end = time.monotonic() + seconds

    def run(
        self, name: str, *command: object, timeout: float, counts: bool = True,
        accept: Callable[[str], bool] = lambda _: True, **environment: str,
    ) -> str | None:  # fmt: skip
        """Runs a command; its output goes to the report. Returns it, or None if the command failed.

        counts: whether a failure fails the whole check. accept: whether the output of a command with status 0 is good.
        """
        begun = time.monotonic()
        timeout = min(timeout, self.end - begun)
        path = self.report / f"{name}.txt"
        status: int | str = "no time was left"
        if timeout > 0:
            print(f"{name} ...", flush=True)
            with open(path, "w", encoding="utf-8") as file:
                try:
                    process = start(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment})
                except OSError as error:
                    status = f"{command[0]}: {error.strerror}"
                else:
                    status = result(process, timeout)
        seconds = time.monotonic() - begun
        text = path.read_text(encoding="utf-8", errors="replace") if timeout > 0 else ""
        if status == 0 and not accept(text):
            status = "not all was run"
        if status != 0 and counts:
            self.failed.append(name)
        self.note(name, f"{'ok' if status == 0 else f'FAILED ({status})'}, {seconds:.0f} s")
        if status != 0:
            print("".join(text.splitlines(True)[-30:]))
            return None
        return text

    def note(self, name: str, text: str) -> None:
        """Adds a line to the table and writes it at once, so that an interrupted run leaves its results."""
        with self.lock:
            self.rows.append((name, text))
            (self.report / "summary.txt").write_text(self.table() + "\n", encoding="utf-8")

    def table(self) -> str:
        return "\n".join(f"{name:<48} {result}" for name, result in self.rows)


def start(command: Iterable[object], **options: object) -> subprocess.Popen:
    """Starts a program in its own process group, so that stop() ends its children too."""
    return subprocess.Popen([str(part) for part in command], cwd=ROOT, start_new_session=True, **options)


def stop(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def result(process: subprocess.Popen, timeout: float) -> int | str:
    """Its exit status, or that it took too long. It does not go on after that, nor after Ctrl-C."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        stop(process)
        return f"not done after {timeout:.0f} s"
    except KeyboardInterrupt:
        stop(process)
        raise


def all_passed(text: str) -> bool:
    """Whether pytest ran its tests, and skipped none."""
    summary = (text.strip().splitlines() or [""])[-1]
    return bool(re.search(r"\d+ passed", summary)) and not re.search(r"skipped|failed|error", summary)


def configure(check: Check, options: list[str]) -> bool:
    """Runs CMake; if it finds no cuBLAS, once more after pip has installed one."""
    command = [
        "cmake", "-S", ROOT, "-B", check.build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
        "-DDELTAMEM_BUILD_TESTS=ON", "-DGGML_CUDA=ON", "-DGGML_CUDA_FA=OFF", "-DGGML_CUDA_NO_VMM=ON",
        "-DCMAKE_CUDA_ARCHITECTURES=native",
        # the source that the package's build has downloaded, if it was here, or that of `make cuda-bundle`
        *(f"-DDELTAMEM_LLAMA_CPP_SOURCE={path}" for path in SOURCES if path.exists()),
        *options,
    ]  # fmt: skip
    if check.run("configure", *command, timeout=120, counts=False) is not None:
        return True
    said = (check.report / "configure.txt").read_text(encoding="utf-8", errors="replace")
    if "has no cuBLAS" not in " ".join(said.split()):
        check.failed.append("configure")
        return False
    packages = ["-c", ROOT / "constraints.txt", "nvidia-cublas", "nvidia-cuda-cccl"]
    check.run("cublas", sys.executable, "-m", "pip", "install", "-q", *packages, timeout=300)
    return check.run("configure", *command, timeout=120) is not None


def decode(model: str, adapter: str, n_tokens: int) -> None:
    """What profile() runs under a profiler: a short prompt, then token by token."""
    from pydeltamem import DeltaMemLlama

    llm = DeltaMemLlama(model_path=model, deltamem_path=adapter or None, n_gpu_layers=-1, n_ctx=512, verbose=False)
    llm.eval(list(range(100, 100 + PROMPT)))
    for token in range(n_tokens):
        llm.eval([100 + token])
    llm.close()


Kernels = dict[str, tuple[int, float]]  # instances and nanoseconds of each


def table(text: str, begin: str) -> Iterable[dict[str, str]]:
    """The rows of the CSV in a profiler's output whose head begins so; none if there is no such table."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith(begin)), len(lines))
    return csv.DictReader(lines[head:])


def nsys_kernels(text: str) -> Kernels:
    """From the CSV of nsys's cuda_gpu_kern_sum."""
    rows = table(text, "Time (%)")
    return {row["Name"]: (int(row["Instances"]), float(row["Total Time (ns)"])) for row in rows if row.get("Instances")}


def ncu_kernels(text: str) -> Kernels:
    """From the CSV of ncu, a row for each launch."""
    kernels: Kernels = {}
    for row in table(text, '"ID"'):
        if row.get("Metric Name") == "gpu__time_duration.sum":
            n, total = kernels.get(row["Kernel Name"], (0, 0.0))
            kernels[row["Kernel Name"]] = (n + 1, total + float(row["Metric Value"].replace(",", "")))
    return kernels


def floors(shape: str) -> dict[str, float]:
    """Floors of our kernels in nanoseconds, with adapter weights in F16; empty if the GPU does not tell."""
    from pydeltamem.bench.synthetic import SHAPES

    try:
        cuda, device, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
        if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
            return {}
        found = []
        for attribute in (13, 36, 37):  # clock rate, memory clock rate, both in kHz; bits of the memory bus
            if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
                return {}
            found.append(value.value)
    except OSError:
        return {}
    clock, bytes_per_ns = found[0] / 1e6, 2 * found[1] * found[2] / 8 / 1e6
    if not clock or not bytes_per_ns:
        return {}
    s, rank = SHAPES[shape], 8
    n_out = (s.n_head * s.head_dim + s.n_embd) / 2  # a token's q and o, in turn
    return {
        "project_read_kernel": (2 * 4 * rank * s.n_embd + 4 * s.n_embd) / bytes_per_ns,
        "correct_kernel": n_out * (2 * rank + 2 * 4) / bytes_per_ns,
        "read_kernel": 45 * PROMPT / clock,  # of the prompt: instructions of one warp
    }


def profile(check: Check, shape: str, model: str, adapter: str, environment: dict[str, str]) -> None:
    """Launches per token, with and without, from two lengths each; and how long each of our kernels takes."""
    tool = "nsys" if shutil.which("nsys") else "ncu" if shutil.which("ncu") else None
    if tool is None:
        check.note("launches per token", "neither nsys nor ncu is installed: not counted")
        return
    lengths = (16, 48) if tool == "nsys" else (2, 4)  # ncu takes each launch alone, which is slow
    per_token = {}
    for side, path in (("without", ""), ("with", adapter)):
        kernels = []
        for n in lengths:
            trace = check.report / f"{tool}-{side}-{n}"
            program = [sys.executable, __file__, "--decode", model, path, n]
            if tool == "nsys":
                command = ["nsys", "profile", "--cuda-graph-trace=node", "-t", "cuda", "-f", "true", "-o", trace]
            else:
                command = ["ncu", "--csv", "--metrics", "gpu__time_duration.sum", "--graph-profiling", "node"]
                command += ["--print-units", "base", "--print-kernel-base", "demangled", "--clock-control", "none"]
                command += ["--target-processes", "all"]
            text = check.run(trace.name, *command, *program, timeout=180, counts=False, **environment)
            if text is not None and tool == "nsys":
                stats = ["nsys", "stats", "-q", "-r", "cuda_gpu_kern_sum", "-f", "csv", f"{trace}.nsys-rep"]
                text = check.run(f"{trace.name}-stats", *stats, timeout=60, counts=False)
            kernels.append((nsys_kernels if tool == "nsys" else ncu_kernels)(text or ""))
            if not kernels[-1]:
                check.note("launches per token", f"{tool} lists no kernels, see {trace.name}.txt: not counted")
                return
        short, long = (sum(instances for instances, _ in of.values()) for of in kernels)
        per_token[side] = (long - short) / (lengths[1] - lengths[0])
    check.note("launches per token", f"{per_token['without']:.1f} without, {per_token['with']:.1f} with the memory")
    floor_of = floors(shape)
    for name, (instances, nanoseconds) in kernels[1].items():
        if match := re.search(r"deltamem::(\w+)", name):
            floor = f", floor {floor_of[match[1]] / 1000:.2f} µs" if match[1] in floor_of else ""
            time_taken = f"{nanoseconds / instances / 1000:.2f} µs, {instances} times{floor}"
            check.note(f"  {name.split('(const')[0][-60:]}", time_taken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda")
    parser.add_argument("--shape", default="qwen3-4b")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--decode", nargs=3, metavar=("MODEL", "ADAPTER", "N"), help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="for CMake, after --")
    args = parser.parse_args()
    if args.decode:
        decode(args.decode[0], args.decode[1], int(args.decode[2]))
        return 0

    if not shutil.which("nvidia-smi") or subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode != 0:
        print("cuda-check: nvidia-smi finds no GPU here: run it on a machine that has one")
        return 1

    check = Check(args.build.resolve(), 60 * args.minutes)
    try:
        steps(check, args.shape, args.options)
    finally:
        print(f"\n{check.table()}\n\nreport: {check.report}")
    return 1 if check.failed else 0


def steps(check: Check, shape: str, options: list[str]) -> None:
    python, build = sys.executable, check.build
    check.run("gpu", "nvidia-smi", timeout=60)
    if not configure(check, options):
        return
    vocab = build / "llama.cpp" / "models" / "ggml-vocab-qwen2.gguf"
    write = (
        "import sys; from pydeltamem.bench.models import synthetic_files;"
        " synthetic_files(*sys.argv[1:4], 8, 1, sys.argv[4])"
    )
    writers: list[subprocess.Popen] = []

    def start_writers(**environment: str) -> None:
        for ftype in ("f16", "q4_k_m"):
            command = [python, "-c", write, shape, ftype, "f16", vocab]
            writers.append(start(command, env={**os.environ, **environment}))

    try:
        if is_built := any((ROOT / "pydeltamem" / "lib").glob("libllama*")):
            start_writers()
        if check.run("build", "cmake", "--build", build, timeout=420) is not None:
            if not is_built:
                start_writers(LLAMA_CPP_LIB_PATH=str(build / "bin"))
            measure(check, shape, vocab, writers)
    finally:
        for writer in writers:
            stop(writer)


def measure(check: Check, shape: str, vocab: Path, writers: list[subprocess.Popen]) -> None:
    python, build = sys.executable, check.build

    environment = {"LLAMA_CPP_LIB_PATH": str(build / "bin")}
    pytest = [python, "-m", "pytest", "-q", "-s", "tests/test_cuda.py"]
    test_op = build / "bin" / "test-op"

    def sanitize(tool: str) -> None:
        if shutil.which("compute-sanitizer"):
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", test_op, "gpu"]
            # memcheck reports as an error that an old CUDA graph cannot be updated, which ggml expects
            check.run(tool, *command, timeout=240, GGML_CUDA_DISABLE_GRAPHS="1")
        else:
            check.note(tool, "compute-sanitizer is not installed: not run")

    check.run("operator", test_op, "gpu", timeout=60)
    with ThreadPoolExecutor() as together:  # nothing in them is timed
        tests = [together.submit(sanitize, tool) for tool in ("memcheck", "racecheck")]
        tests.append(
            together.submit(
                check.run, "golden", *pytest, timeout=240, accept=all_passed, NVIDIA_TF32_OVERRIDE="0", **environment
            )
        )
    for test in tests:
        test.result()

    for writer in writers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            writer.wait(max(0, check.end - time.monotonic()))
    for ftype in ("f16", "q4_k_m"):
        path = check.report / f"bench-{ftype}.json"
        command = ["bench", "--synthetic", shape, "--ftype", ftype, "--vocab", vocab, "-p", 2048, "-n", 64]
        command += ["-b", 2048, "-ub", 2048, "--pairs", 10, "--rss", 0, "--json", path]
        if check.run(f"bench-{ftype}", python, "-m", "pydeltamem.cli", *command, timeout=300, **environment) is None:
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        for what in ("decode", "prompt"):
            r = found[what]
            check.note(f"  {shape} {ftype}, {what}", f"{r['ratio']:.4f} × ({r['low']:.4f} to {r['high']:.4f})")
        if ftype == "q4_k_m":
            profile(check, shape, found["setup"]["model"], found["setup"]["deltamem"], environment)

    check.run("golden-tf32", *pytest, timeout=300, counts=False, accept=all_passed, **environment)


if __name__ == "__main__":
    sys.exit(main())
