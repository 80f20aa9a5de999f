"""The code of a stage by meaning: what a change of it runs again, and what it doesn't."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from flows.recording.code import PACKAGES, WITHOUT_EFFECT, Code, _parsed, packages_digest, stages_reaching
from flows.stages import STAGES

ROOT = Path(__file__).parents[2]
IMAGE = "svd.training.stages:run_image_pretraining"


@pytest.fixture(scope="module")
def code() -> Code:
    return Code(ROOT)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the packages that a test may edit."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def changed(tree: Path, before: Code) -> set[str]:
    """The stages whose digest in `tree` is another one than before."""
    after = Code(tree)
    return {name for name, stage in STAGES.items() if after.digest(stage.function) != before.digest(stage.function)}


def test_a_parse_that_another_thread_disturbed_is_done_again(code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.11: `AST constructor recursion depth mismatch`, which once failed a pipeline."""
    original, calls = ast.parse, []

    def disturbed(text: str) -> ast.Module:
        calls.append(text)
        if len(calls) % 2:
            raise SystemError("AST constructor recursion depth mismatch (before=66, after=75)")
        return original(text)

    expected = code.digest(IMAGE)
    _parsed.cache_clear()
    monkeypatch.setattr(ast, "parse", disturbed)
    assert Code(ROOT).digest(IMAGE) == expected and len(calls) > 20


def test_reach_follows_names_and_not_whole_files(code: Code) -> None:
    image = code.reach(IMAGE)
    assert {
        "svd/training/muon.py",
        "svd/training/runner.py",
        "svd/model/formats/folders.py",
        "svd/training/ema.py",
    } <= image
    assert not {"svd/latents/orbits.py", "svd/training/lora.py", "svd/model/formats/convert.py"} & image
    assert "svd/latents/orbits.py" in code.reach("svd.training.stages:run_multiview_finetuning")
    assert "svd/media/video.py" in code.reach(IMAGE, skip=frozenset()) - image


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_reaches_its_own_code_and_nothing_without_effect(name: str, code: Code) -> None:
    reached = code.reach(STAGES[name].function)
    assert code.file_of(STAGES[name].function.split(":")[0]) in reached
    skipped = tuple(f"{entry.replace('.', '/')}{end}" for entry in WITHOUT_EFFECT for end in "/.")
    assert not [file for file in reached if file.startswith(skipped)]


def test_what_has_no_effect_exists_and_says_why(code: Code) -> None:
    assert all(code.file_of(entry) and len(reason) > 20 for entry, reason in WITHOUT_EFFECT.items())


def test_comments_docstrings_and_formatting_run_nothing_again(code: Code, tree: Path) -> None:
    for file in ("svd/training/callbacks.py", "svd/curation/stage.py", "evaluation/tables.py", "svd/model/unet.py"):
        text = (tree / file).read_text()
        start = text.index('"""', 3) + 3
        (tree / file).write_text(f'"""Another docstring."""\n# A comment.\n{text[start:]}\n\n# The end.\n')
    assert changed(tree, code) == set()


def test_a_changed_constant_runs_what_can_reach_it(code: Code, tree: Path) -> None:
    (tree / "svd/training/lora.py").write_text((tree / "svd/training/lora.py").read_text() + "\nEDITED = 1\n")
    assert changed(tree, code) == {"camera-lora"}


def test_what_runs_again_after_an_edit_can_be_asked_for(code: Code, tree: Path) -> None:
    """A file counts as a whole, even where a stage uses one function of it."""
    for file in ("svd/training/lora.py", "svd/catalogue/axes.py", "evaluation/pages/style.css"):
        edited = tree / file
        edited.write_text(edited.read_text() + "\nEDITED = 1\n")
        assert {stage.name for stage in stages_reaching(edited, tree)} == changed(tree, code), file
        shutil.copy(ROOT / file, edited)
    axes = {stage.name for stage in stages_reaching(ROOT / "svd/catalogue/axes.py")}
    assert {"curation", "latents", *(name for name, stage in STAGES.items() if stage.losses)} <= axes
    assert "orbits" not in axes and not stages_reaching(ROOT / "svd/core/files.py")


def test_a_changed_function_of_curation_runs_curation(code: Code, tree: Path) -> None:
    file = tree / "svd/curation/cuts/decisions.py"
    file.write_text(file.read_text() + "\nEDITED = 1\n")
    assert {"curation"} <= changed(tree, code) <= {"curation", "threshold-calibration"}


def test_data_files_count_by_their_bytes(code: Code, tree: Path) -> None:
    edit(tree / "evaluation/baselines.yaml", "\n", "\n# edited\n")
    assert "report" in changed(tree, code) and "curation" not in changed(tree, code)
    assert "svd/catalogue/templates/report.html" in code.data_files(code.reach(STAGES["curation"].function))
    assert not code.data_files(code.reach(IMAGE))


def write(folder: Path, **files: str) -> Code:
    (folder / "svd").mkdir()
    for name, text in files.items():
        path = folder / "svd" / f"{name.replace('__', '/')}.py".replace("package", "__init__")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return Code(folder)


def test_names_are_followed_through_modules_packages_and_tables_of_strings(tmp_path: Path) -> None:
    code = write(
        tmp_path,
        a="from svd import b\nimport svd.c as c\nTABLE = {'d': 'svd.d:Class', 'f': 'svd.g'}\n"
        "def run():\n    from svd.sub import e\n    return b.one(), list(map(str, [c])), TABLE, e.two\n",
        b="from svd.h import used, unused\ndef one():\n    return used()\ndef other():\n    return unused()\n",
        c="from svd.i import third\nVALUE = third\n",
        d="class Class:\n    pass\n",
        g="if True:\n    from svd.j import thing\nx = thing\n",
        h="def used():\n    pass\nfrom svd.k import far\ndef unused():\n    return far\n",
        i="third = 3\n",
        j="thing = 1\n",
        k="far = 1\n",
        sub__package="from svd.l import first\nfirst()\n",
        sub__e="two = 2\n",
        l="def first():\n    pass\n",
    )
    assert code.reach("svd.a:run") == {f"svd/{name}.py" for name in [*"abcdghijl", "sub/__init__", "sub/e"]}


def test_imports_for_type_checkers_count_for_nothing(tmp_path: Path) -> None:
    typed = "if TYPE_CHECKING:\n    from svd.b import B\ndef run(x: B):\n    return x\n"
    code = write(tmp_path, a=typed, b="B = int\n")
    assert code.reach("svd.a:run") == {"svd/a.py"}


def test_a_new_version_of_a_package_counts_and_a_new_hash_does_not(tmp_path: Path) -> None:
    assert packages_digest(tmp_path) is None
    lock = tmp_path / "requirements.lock"
    lock.write_text("# made by uv\ntorch==2.8.0 \\\n    --hash=sha256:1\nrich==1.0\n")
    first = packages_digest(tmp_path)
    lock.write_text("rich==1.0\ntorch==2.8.0 \\\n    --hash=sha256:1 \\\n    --hash=sha256:2\n")
    assert packages_digest(tmp_path) == first
    lock.write_text("rich==1.0\ntorch==2.9.0 \\\n    --hash=sha256:1\n")
    assert packages_digest(tmp_path) != first
    assert packages_digest(ROOT)
