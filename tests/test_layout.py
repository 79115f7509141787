"""The shape of the repository: folders, import directions, what a wheel contains, what starts fast."""

import ast
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("kernels", "copedit_rt", "training", "bench")  # each may import those before it
MODULES = sorted(path for name in ORDER for path in (ROOT / name).rglob("*.py"))
LAZY = {"copedit_rt/cli.py"}  # a sub-command may load a package above it, inside the function

WEIGHT_LIMIT = 12 * 2**20  # bytes a weights file in the repository may have


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


def imported(node: ast.AST) -> list[str]:
    """Absolute module names that a node imports; importlib.import_module("literal") counts."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""] if node.level == 0 else []
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported inside a function) for every import below a node."""
    for node in ast.iter_child_nodes(tree):
        yield from ((name, inside) for name in imported(node))
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, inside or function)


def upward(source: str, package: str, lazy: bool) -> list[str]:
    """The imports of a module of `package` that point up or outside what `lazy` permits."""
    above = (*ORDER[ORDER.index(package) + 1 :], "tests")
    found = [(name, inside) for name, inside in imports(ast.parse(source)) if name.split(".")[0] in above]
    return [name for name, inside in found if not (lazy and inside)]


def test_top_level_folders() -> None:
    for name in (*ORDER, "tests"):
        assert (ROOT / name).is_dir(), f"{name}/ is missing"
    for name in ORDER:
        assert (ROOT / name / "__init__.py").is_file(), f"{name}/ is not a package"
    for name in ("setup.py", "README.md", "LICENSE", "CONTRIBUTING.md", "Makefile", "constraints.txt"):
        assert (ROOT / name).is_file(), f"{name} is missing"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    found = upward(path.read_text("utf-8"), name.split("/")[0], name in LAZY)
    assert not found, f"{name} imports {found}: {' <- '.join(ORDER)}"


@pytest.mark.parametrize(
    ("source", "package", "lazy", "bad"),
    [
        ("import training.data", "kernels", False, True),
        ("from bench import x", "training", True, True),
        ("if True:\n    import copedit_rt", "kernels", False, True),
        ("def f():\n    from training import train", "copedit_rt", False, True),
        ("def f():\n    import_module('training.train')", "copedit_rt", False, True),
        ("def f():\n    from training import train", "copedit_rt", True, False),
        ("import kernels, trainingx\nfrom . import training", "copedit_rt", False, False),
    ],
)
def test_the_import_rule_itself(source: str, package: str, lazy: bool, bad: bool) -> None:
    assert bool(upward(source, package, lazy)) == bad


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
    code = "import sys, copedit_rt.geometry, copedit_rt.study; sys.exit('torch' in sys.modules)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr or "copedit_rt.geometry or copedit_rt.study loads torch"


def test_a_foreign_kernels_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    foreign = tmp_path / "kernels" / "__init__.py"
    foreign.write_text("")
    code = "import sys; sys.path[:0] = sys.argv[1:]; import copedit_rt"
    assert python("-c", code, str(ROOT), str(tmp_path), cwd=tmp_path).returncode == 0
    done = python("-c", code, str(tmp_path), str(ROOT), cwd=tmp_path)
    assert done.returncode != 0
    assert str(foreign) in done.stderr.splitlines()[-1]


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
    wanted = {path.relative_to(ROOT).as_posix() for path in MODULES} | {"copedit_rt/py.typed"}
    weights = [path for path in (ROOT / "copedit_rt/weights").rglob("*") if path.is_file()]
    presets = list((ROOT / "training/presets").glob("*.toml"))
    wanted |= {path.relative_to(ROOT).as_posix() for path in (*weights, *presets)}
    assert built == wanted


def test_weights_stay_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (ROOT / "copedit_rt/weights").rglob("*.safetensors")}
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
    assert names("\n".join(wanted)) == pinned


def test_no_path_of_a_machine() -> None:
    roots = "work|farm|root|home|Users|mnt|opt"
    pattern = re.compile(rf"(?<![\w.:/-])/(?:{roots})/\w|[A-Z]:\\\w")
    assert pattern.search("open('/" + "home/me/x')") and not pattern.search("a/home/b and https://x.y/home/z")
    plain = [path for name in ("*.toml", "*.txt", "*.md", "Makefile", "setup.py") for path in ROOT.glob(name)]
    for path in [*MODULES, *(ROOT / "tests").rglob("*.py"), *plain]:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            assert not pattern.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
