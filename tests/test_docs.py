"""What the documents tell people to type works: the worked examples, the commands, the files they name."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
         if page.exists()]
EXAMPLE = re.compile(r"<!-- example: (append|new|edit) (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
SCRIPT = re.compile(r"python (train|test)\.py|python -m (utils|benchmarks)\.|python -c |torchrun .*train\.py")
NOT_OURS = shutil.ignore_patterns(".git", "saved", "data", ".venv", "venv", "__pycache__", ".*_cache", ".hypothesis")


def commands(page: Path) -> list[list[str]]:
    """Every `python ...` a page shows, in a block or in a line, without the word python."""
    found = []
    for line in page.read_text().replace("\\\n", " ").splitlines():
        shown = re.findall(r"`([^`]+)`", line) or [line]
        for text in shown:
            for part in text.split("&&"):
                part = part.strip().removeprefix("$ ").replace("\\|", "|")
                if SCRIPT.match(part):
                    found.append(shlex.split(part, comments=True)[1:])
    return found


SHOWN = [(page.name, command) for page in PAGES for command in commands(page) if "--help" not in command]


def insert(text: str, diff: str) -> str:
    """Put a diff's `+` lines after the line of context above them."""
    lines, at = text.splitlines(), 0
    for line in diff.splitlines():
        if line.startswith("+"):
            lines.insert(at, line[1:])
        else:
            at = lines.index(line[1:], at)
        at += 1
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def with_examples(tmp_path_factory) -> Path:
    """A copy of the project with CONTRIBUTING's worked examples followed."""
    copy = tmp_path_factory.mktemp("project") / "copy"
    shutil.copytree(ROOT, copy, ignore=NOT_OURS)
    for kind, name, block in EXAMPLE.findall((ROOT / "CONTRIBUTING.md").read_text()):
        file = copy / name
        if kind == "append":
            file.write_text(file.read_text() + "\n\n" + block)
        elif kind == "new":
            assert not file.exists(), f"{name} is there already"
            file.write_text(block)
        else:
            file.write_text(insert(file.read_text(), block))
    return copy


@pytest.mark.parametrize("command", commands(ROOT / "CONTRIBUTING.md"), ids=lambda command: " ".join(command)[:70])
def test_examples_of_contributing_run(command, with_examples, run_cli):
    done = run_cli(command, cwd=with_examples)
    assert done.returncode == 0, done.stderr


def test_an_example_is_really_checked(with_examples, run_cli):
    """The new loss is known by name and by argument, as the page says."""
    command = ["train.py", "-c", "configs/digits_lt_ce.json", "--set", "loss.type=VSLoss", "--set", "loss.args.gama=1"]
    done = run_cli(command, cwd=with_examples)
    assert done.returncode == 2
    assert "gama" in done.stderr and "gamma" in done.stderr


@pytest.mark.parametrize("page, command", SHOWN, ids=[f"{page}: {' '.join(c)}" for page, c in SHOWN])
def test_files_of_commands_exist(page, command):
    """A config or script that a command names is in the repository."""
    if command[0].endswith(".py"):
        assert (ROOT / command[0]).exists()
    if command[0] == "-m":
        assert (ROOT / command[1].replace(".", "/")).with_suffix(".py").exists()
    for word in command:
        if re.fullmatch(r"configs/[\w/]+\.json", word):
            assert (ROOT / word).exists(), f"{page} names {word}"


@pytest.mark.parametrize("page, command", [shown for shown in SHOWN if {"train.py", "test.py"} & {*shown[1]}
                                           and shown[0] != "CONTRIBUTING.md"],  # run above, with its examples
                         ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_flags_and_values_are_right(page, command, tmp_path, monkeypatch):
    """The real parser and checker read the command; checkpoints that the reader is to fill in are stood in for."""
    from utils.cli import parse_test, parse_train
    from utils.config import load_config

    monkeypatch.chdir(ROOT)
    script = next(word for word in command if word in ("train.py", "test.py"))
    checkpoint = tmp_path / "checkpoint.pth"
    checkpoint.touch()
    flags = command[command.index(script) + 1:]
    flags = [str(checkpoint) if re.fullmatch(r"[A-Z0-9_]{4,}|saved/\S+\.pth", word) else word for word in flags]
    args = (parse_train if script == "train.py" else parse_test)(flags)
    if args.config:
        load_config(args.config, args.overrides)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.slow
def test_commands_of_methods_run(tmp_path, run_cli):
    """docs/methods.md from top to bottom, an epoch each: every method starts from what the one before it left."""
    for command in commands(ROOT / "docs" / "methods.md"):
        command = [re.sub(r"checkpoint-epoch\d+", "checkpoint-epoch1", word.replace("saved/", f"{tmp_path}/"))
                   for word in command]
        if command[0] == "train.py":
            command += ["--epochs", "1", "--save_dir", str(tmp_path), "-d", "cpu"]
        done = run_cli(command)
        assert done.returncode == 0, f"python {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
