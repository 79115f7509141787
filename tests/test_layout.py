"""The shape of the repository: folders, what a wheel contains, what starts fast. Import directions: `make lint`."""

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Package -> the folder that it lies in.
FOLDERS = {"copedit_kernels": "kernels", "copedit_rt": ".", "copedit_training": "training", "copedit_bench": "bench"}
MODULES = sorted(path for name, folder in FOLDERS.items() for path in (ROOT / folder / name).rglob("*.py"))

WEIGHT_LIMIT = 12 * 2**20  # bytes a weights file in the repository may have


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_top_level_folders() -> None:
    for name in ("kernels", "copedit_rt", "training", "bench", "tests"):
        assert (ROOT / name).is_dir(), f"{name}/ is missing"
    for name, folder in FOLDERS.items():
        assert (ROOT / folder / name / "__init__.py").is_file(), f"{name} is not a package"
    for name in ("setup.py", "README.md", "LICENSE", "CONTRIBUTING.md", "Makefile", "constraints.txt"):
        assert (ROOT / name).is_file(), f"{name} is missing"


@pytest.mark.parametrize(
    "code",
    [
        "import copedit_rt, copedit_rt.config, copedit_rt.errors",
        "import copedit_rt.cli",
        "import sys; sys.argv = ['copedit', '--help']; from copedit_rt.cli import main; main()",
    ],
    ids=["package", "cli", "help"],
)
def test_starts_without_heavy_imports(code: str) -> None:
    """`copedit -h` within a second: nothing of torch, triton, scipy or nibabel is loaded to print it."""
    report = (
        "import atexit, sys; atexit.register(lambda: print('heavy:', *sorted({'torch', 'triton', 'scipy', "
        "'nibabel'} & set(sys.modules))))\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python("-c", report + code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["heavy:"]
    # Processor time, since the wall clock also measures what else the machine does.
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 1.0


def test_geometry_and_files_without_torch() -> None:
    """An engine without torch reads and writes studies with these modules."""
    rooms = ("names", "nifti", "grids", "find", "study", "prepare", "preview")
    code = f"import sys, {', '.join(f'copedit_rt.images.{room}' for room in rooms)}; sys.exit('torch' in sys.modules)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr or "copedit_rt.images loads torch"


def test_one_version() -> None:
    import copedit_rt

    done = python("setup.py", "--version")
    assert done.stdout.split() == [copedit_rt.__version__], done.stderr
    for name in ("setup.py", "pyproject.toml"):
        assert copedit_rt.__version__ not in (ROOT / name).read_text("utf-8"), f"{name} repeats the version"


def test_everything_is_shipped(tmp_path: Path) -> None:
    """A build contains every module and data file of the four packages, and no tests."""
    lib = tmp_path / "lib"
    done = python("setup.py", "-q", "build", "--build-base", str(tmp_path), "--build-lib", str(lib))
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(lib).as_posix() for path in lib.rglob("*") if path.is_file()}
    weights = [path for path in (ROOT / "copedit_rt/weights").rglob("*") if path.is_file()]
    presets = list((ROOT / "training/copedit_training/presets").glob("*.toml"))
    pages = [path for end in ("html", "js", "txt") for path in (ROOT / "copedit_rt/report").glob(f"*.{end}")]
    files = (*MODULES, *pages, *weights, *presets, ROOT / "copedit_rt/py.typed")
    inside = {path: next(ROOT / f for n, f in FOLDERS.items() if n in path.relative_to(ROOT).parts) for path in files}
    assert built == {path.relative_to(folder).as_posix() for path, folder in inside.items()}


def test_weights_stay_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (ROOT / "copedit_rt/weights").glob("*/*.safetensors")}
    assert all(size <= WEIGHT_LIMIT for size in sizes.values()), sizes


def test_every_direct_dependency_is_pinned() -> None:
    def names(text: str) -> set[str]:
        return {name.lower() for name in re.findall(r"^([A-Za-z0-9._-]+)", text, re.M)}

    pinned = names((ROOT / "constraints.txt").read_text("utf-8"))
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup")
    given = {k.arg: k.value for k in call.keywords}
    wanted = list(ast.literal_eval(given["install_requires"]))
    for extra in ast.literal_eval(given["extras_require"]).values():
        wanted += extra
    assert names("\n".join(wanted)) - {"copedit"} == pinned


def test_every_package_above_the_runtime_adds_its_commands() -> None:
    """What an installation is told about commands is what a checkout finds by itself."""
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup")
    points = ast.literal_eval(next(k.value for k in call.keywords if k.arg == "entry_points"))
    told = {point.partition("= ")[2] for point in points["copedit.commands"]}
    there = {f"{name}.cli:app" for name, folder in FOLDERS.items() if (ROOT / folder / name / "cli.py").is_file()}
    assert told == there - {"copedit_rt.cli:app"} != set()


def test_no_path_of_a_machine() -> None:
    roots = "work|farm|root|home|Users|mnt|opt"
    pattern = re.compile(rf"(?<![\w.:/-])/(?:{roots})/\w|[A-Z]:\\\w")
    assert pattern.search("open('/" + "home/me/x')") and not pattern.search("a/home/b and https://x.y/home/z")
    plain = [path for name in ("*.toml", "*.txt", "*.md", "Makefile", "setup.py") for path in ROOT.glob(name)]
    for path in [*MODULES, *(ROOT / "tests").rglob("*.py"), *plain]:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            assert not pattern.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
