"""Makes a virtual environment with the project in it: ``python3 tools/venv.py .venv``.

Runs on a bare machine: any Python 3 with ``venv`` and ``pip``. It picks the newest Python
between OLDEST and NEWEST that it finds (on PATH, through uv, in pyenv's folder), installs uv
beside the environment, and installs the project with the exact versions of constraints.txt.
Does nothing when the environment already stands for the same inputs.
"""

import argparse
import glob
import hashlib
import os
import shutil
import subprocess
import sys

OLDEST, NEWEST = (3, 11), (3, 13)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def version_of(python):
    """(major, minor) of an interpreter that can make environments, or None where it does not run."""
    code = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
    try:
        out = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=20)
        return tuple(map(int, out.stdout.split())) if out.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def candidates(uv):
    """Interpreters worth trying, by name and by place."""
    minors = range(NEWEST[1], OLDEST[1] - 1, -1)
    found = [shutil.which(f"python3.{m}") for m in minors]
    for m in minors:
        found += glob.glob(os.path.expanduser(f"~/.pyenv/versions/3.{m}.*/bin/python3"))
    if uv:
        listed = subprocess.run(
            [uv, "python", "list", "--only-installed", "--no-python-downloads"],
            capture_output=True,
            text=True,
        )
        found += [line.split()[1] for line in listed.stdout.splitlines() if len(line.split()) > 1]
    return [p for p in [*found, sys.executable] if p]


def choose_python(wanted, uv):
    """The newest suitable interpreter (or the one of version ``wanted``, such as ``3.11``)."""
    best = None
    for python in candidates(uv):
        version = version_of(python)
        if version is None or not OLDEST <= version <= NEWEST:
            continue
        if wanted and version != tuple(map(int, wanted.split("."))):
            continue
        if best is None or version > best[0]:
            best = (version, python)
    if best is None:
        span = wanted or "{}.{} to {}.{}".format(*OLDEST, *NEWEST)
        sys.exit(f"error: no Python {span} with the venv module was found; install one and run make again")
    return best[1]


def get_uv(venv):
    """Path of uv: the one on PATH, or one installed beside the environment; None where neither is had."""
    if shutil.which("uv"):
        return shutil.which("uv")
    home = os.path.abspath(venv) + "-tools"
    uv = os.path.join(home, "bin", "uv")
    if not os.path.exists(uv):
        made = subprocess.run([sys.executable, "-m", "venv", home], capture_output=True, text=True)
        if made.returncode:
            sys.exit(f"error: {sys.executable} cannot make a virtual environment: {made.stdout[:500]}")
        pip = [os.path.join(home, "bin", "python"), "-m", "pip", "install", "-q", "uv"]
        subprocess.run(pip, check=False)
    return uv if os.path.exists(uv) else None


def local_wheels(python):
    """pip's own ``find-links`` folders as options for uv, which does not read pip's settings."""
    listed = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True)
    folders = []
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        if name.endswith("find-links"):
            folders += value.strip("'\"").split()
    return [option for folder in dict.fromkeys(folders) for option in ("--find-links", folder)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("venv")
    parser.add_argument("--python", help="a version such as 3.11 (default: the newest suitable one)")
    parser.add_argument("--extras", default="dev", help="comma-separated extras of pyproject.toml")
    parser.add_argument("--requirements", help="install this file in place of the project")
    args = parser.parse_args()

    inputs = [args.python or "", args.extras]
    for name in (args.requirements,) if args.requirements else ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(ROOT, name)) as f:
            inputs.append(f.read())
    stamp = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
    ready = os.path.join(args.venv, "ready")
    if os.path.exists(ready):
        with open(ready) as f:
            if f.read() == stamp:
                return

    uv = get_uv(args.venv)
    python = choose_python(args.python, uv)
    print(f"setting up {args.venv} with {python}", flush=True)
    subprocess.run([python, "-m", "venv", "--clear", args.venv], check=True)
    inside = os.path.join(args.venv, "bin", "python")
    install = [inside, "-m", "pip", "install"]
    if uv:
        install = [uv, "pip", "install", "--python", inside, *local_wheels(inside)]
    what = ["-c", os.path.join(ROOT, "constraints.txt"), "-e", f"{ROOT}[{args.extras}]"]
    if args.requirements:
        what = ["-r", os.path.join(ROOT, args.requirements)]
    subprocess.run([*install, "-q", *what], check=True)
    with open(ready, "w") as f:
        f.write(stamp)


if __name__ == "__main__":
    main()
