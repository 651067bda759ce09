"""What the documents tell people to type works: the worked examples, the commands, the files they name.

The pages' tools are run on a folder of photos, with a model that was trained on it as docs/own-data.md says.
"""

import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
         if page.exists()]
EXAMPLE = re.compile(r"<!-- example: (append|new|edit) (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
SCRIPT = re.compile(r"python (train|test)\.py|python -m (tools|benchmarks)\.|python -c |torchrun .*train\.py")
NOT_OURS = shutil.ignore_patterns(".git", "results", "saved", "data", ".venv", "venv", "__pycache__", ".*_cache",
                                  ".hypothesis")


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


#: CONTRIBUTING's commands, and last one that misspells an argument of the loss that the page adds.
EXAMPLES = [*commands(ROOT / "CONTRIBUTING.md"),
            ["train.py", "-c", "configs/digits_lt_ce.json", "--set", "loss.type=VSLoss", "--set", "loss.args.gama=1"]]
ONE_AFTER_THE_OTHER = """
import contextlib, io, json, runpy, sys
found = []
for command in json.loads(sys.argv[1]):
    wrote, status = io.StringIO(), 0
    with contextlib.redirect_stdout(wrote), contextlib.redirect_stderr(wrote):
        try:
            if command[0] == "-c":
                sys.argv = command
                exec(command[1], {"__name__": "__main__"})
            elif command[0] == "-m":
                sys.argv = command[1:]
                runpy.run_module(command[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = command
                runpy.run_path(command[0], run_name="__main__")
        except SystemExit as ended:
            status = ended.code or 0
    found.append([status, wrote.getvalue()])
print(json.dumps(found))
"""
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
            file.parent.mkdir(exist_ok=True)
            file.write_text(block)
        else:
            file.write_text(insert(file.read_text(), block))
    return copy


@pytest.fixture(scope="module")
def examples_said(with_examples, run_cli) -> list[list]:
    """`[exit status, what it wrote]` of each of `EXAMPLES`, run one after the other by one process in that copy."""
    done = run_cli(["-c", ONE_AFTER_THE_OTHER, json.dumps(EXAMPLES)], cwd=with_examples, check=True, timeout=900)
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", range(len(EXAMPLES) - 1), ids=lambda number: " ".join(EXAMPLES[number])[:70])
def test_examples_of_contributing_run(number, examples_said):
    status, wrote = examples_said[number]
    assert status == 0, wrote


def test_an_example_is_really_checked(examples_said):
    """The new loss is known by name and by argument, as the page says."""
    status, wrote = examples_said[-1]
    assert status == 2
    assert "gama" in wrote and "gamma" in wrote


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
    from tools.flags import parse_test, parse_train
    from utils.config.load import load_config

    monkeypatch.chdir(ROOT)
    script = next(word for word in command if word in ("train.py", "test.py"))
    checkpoint = tmp_path / "checkpoint.pth"
    checkpoint.touch()
    flags = command[command.index(script) + 1:]
    flags = [str(checkpoint) if re.fullmatch(r"[A-Z0-9_]{4,}|saved/\S+\.pth", word) else word for word in flags]
    args = (parse_train if script == "train.py" else parse_test)(flags)
    if args.config:
        load_config(args.config, args.overrides)


def anchors(page: Path) -> set[str]:
    """Where in a page a link can lead, as GitHub names its headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    links = [(page, *link) for page in PAGES
             for link in re.findall(r"\]\((?!https?:|mailto:)([^)#]*)(?:#([^)]+))?\)", page.read_text())]
    assert len(links) > 30
    for page, target, anchor in links:
        leads = (page.parent / target) if target else page
        assert leads.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(leads), f"{page.name} links to {target}#{anchor}"


def test_tests_that_pages_name_are_there():
    """By path, or by name alone where the page has said the folder."""
    ours = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    named = [(page.name, name) for page in PAGES
             for name in re.findall(r"(?:tests/[\w/]*)?\btest_\w+\.py\b", page.read_text())]
    assert len(named) > 20 and len(SHOWN) > 60
    for page, name in named:
        assert any(f"/{path}".endswith(f"/{name}") for path in ours), f"{page} names {name}"


def test_our_figures_are_the_same_on_both_pages():
    """What docs/reproduce.md has as ours is a row of README's results."""
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"\| ([\d.]+) / ([\d.]+) / ([\d.]+) / ([\d.]+) \|$", (ROOT / "docs" / "reproduce.md").read_text(),
                      re.MULTILINE)
    assert len(rows) >= 5
    for row in rows:
        assert "| " + " | ".join(row) + " |" in readme, row


def test_readmes_table_is_that_of_the_kept_runs(call_cli):
    """Written by the command that stands above it."""
    pytest.importorskip("timm")     # some of its networks' parameters are counted
    text = (ROOT / "README.md").read_text()
    shown = text.split("<!-- results: python -m tools.compare results/ --readme -->")[1].split("<!-- end -->")[0]
    assert shown.strip() == call_cli(["-m", "tools.compare", "results/", "--readme"], check=True).stdout.strip()


@pytest.mark.slow
def test_commands_of_methods_run(tmp_path, run_cli):
    """docs/methods.md from top to bottom, an epoch each: every method starts from what the one before it left."""
    for command in commands(ROOT / "docs" / "methods.md"):
        command = [re.sub(r"checkpoint-epoch\d+", "checkpoint-epoch1", word.replace("saved/", f"{tmp_path}/"))
                   for word in command]
        if command[0] == "train.py":
            command += ["--epochs", "1", "--save_dir", str(tmp_path), "-d", "cpu"]
        done = run_cli(command, timeout=1800)
        assert done.returncode == 0, f"python {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


# ---------------------------------------------------------------------- the tools, on a new user's photos

RUN = "saved/models/image_folder/first"
#: A run of a small ResNet: the one of ours that an older version's checkpoint can hold, and soon exported.
LISTS_RUN = "saved/models/list_file_ride/first"
#: What a page's reader fills in.
STANDS_FOR = {"CHECKPOINT": f"{RUN}/model_best.pth", f"{RUN}/checkpoint-epoch30.pth": f"{RUN}/checkpoint-epoch1.pth",
              "RUN_FOLDER": RUN, "photos/": "holiday", "LIST": "unknown.txt",
              "saved/models/cifar100_lt_ride/s0": RUN, "IN": f"{LISTS_RUN}/checkpoint-epoch1.pth",
              "OUT": "converted.pth", "SHARDS": "my_shards", "train-{00000..00123}.tar": "train-00000.tar",
              "test-{00000..00049}.tar": "train-00000.tar", "model.onnx": f"{LISTS_RUN}/model.onnx",
              "PATH...": "holiday"}
OWN_DATA = commands(ROOT / "docs" / "own-data.md")
TRAININGS = [command for command in OWN_DATA if command[0] == "train.py"]
TRAININGS.append(["train.py", "-c", "configs/list_file_ride.json", "--data_dir", "my_lists"])  # named in the text
AFTERWARDS = [command for command in OWN_DATA if command[0] != "train.py"] + \
    [command for page in PAGES for command in commands(page)
     if (command[0] == "-m" and command[1].startswith("tools.") and command[2:]) or command == ["-m", "tools.keys"]]
#: Each once, what the reader fills in filled in; runs are kept before those that are kept are compared.
AFTERWARDS = sorted(dict.fromkeys(tuple(STANDS_FOR.get(word, word).rstrip("/") for word in command)
                                  for command in AFTERWARDS), key=lambda command: "tools.keep" not in command)
#: Tools that need no device.
ON_NONE = ("tools.keys", "tools.compare", "tools.gflops", "tools.convert_checkpoint", "tools.keep", "tools.shard")


def say(words: list[str], capsys) -> str:
    """`python *words` in this process; its output. Fails where the exit status isn't 0."""
    capsys.readouterr()
    argv, sys.argv = sys.argv, words[1:] if words[0] == "-m" else words
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, capsys.readouterr().err
    finally:
        sys.argv = argv
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def new_user(tmp_path_factory):
    """A folder with my_images/, my_lists/, holiday/ and the configs, nothing trained yet."""
    home = tmp_path_factory.mktemp("new_user")
    rng = np.random.default_rng(0)

    def photos(folder: Path, count: int, colour: int) -> None:
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 120, (40 + 2 * i, 50, 3))
            pixels[..., colour] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:04d}.{'png' if i % 2 else 'jpg'}")
    for colour, (name, count) in enumerate({"ant": 24, "bee": 11, "crab": 6}.items()):
        photos(home / "my_images" / name, count, colour)
    photos(home / "holiday", 3, 1)
    (home / "my_lists").mkdir()
    for split in ("train", "test"):
        lines = [f"../my_images/{name}/{i:04d}.{'png' if i % 2 else 'jpg'} {label}"
                 for label, name in enumerate(("ant", "bee", "crab")) for i in range(split == "test", 6, 2)]
        (home / "my_lists" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (home / "unknown.txt").write_text("holiday/0000.jpg\n")
    shutil.copytree(ROOT / "configs", home / "configs")
    return home


@pytest.mark.parametrize("command", TRAININGS, ids=" ".join)
def test_trainings_of_own_data(command, new_user, monkeypatch, capsys):
    monkeypatch.chdir(new_user)
    if command[2].startswith("configs/list_file"):
        command = [*command, "--set", "data_loader.args.allow_outside=true"]
    if "--dry_run" not in command:
        command = [*command, "--epochs", "1", "--run_id", "first"]
    said = say([*command, "-d", "cpu", "--set", "data_loader.args.image_size=32", "--set", "trainer.figures=false",
                "--set", "data_loader.args.num_workers=0"], capsys)
    assert "classes: 3, training images:" in said
    assert "--dry_run" in command or "python test.py -r" in said.splitlines()[-5]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # run again, as if by itself
@pytest.mark.parametrize("command", AFTERWARDS, ids=" ".join)
def test_what_comes_after(command, new_user, monkeypatch, capsys):
    if any("onnx" in word for word in command):
        for optional in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(optional)
    if "configs/image_folder.json" in command:      # costs are those of the network that it names
        pytest.importorskip("timm")
    monkeypatch.chdir(new_user)
    assert (new_user / RUN / "checkpoint-epoch1.pth").is_file(), "test_trainings_of_own_data makes it"
    command = list(command)
    if command[1] == "tools.export":
        command[command.index("-r") + 1] = f"{LISTS_RUN}/checkpoint-epoch1.pth"
    if command[1] == "tools.sweep" and "--dry_run" not in command:
        command.append("--dry_run")  # a real one is in tests/tools/test_sweep.py
    if command[1] not in ON_NONE and {"-d", "--gpus"}.isdisjoint(command):
        command += ["-d", "cpu"]
    said = say(command, capsys)
    assert said.strip()
    for flag in ("--csv", "--gallery", "--html"):
        assert flag not in command or Path(command[command.index(flag) + 1]).stat().st_size > 100
    if command[1] == "tools.report" or "--report" in command:
        assert (new_user / RUN / "report.html").is_file()
