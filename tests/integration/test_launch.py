"""run_train.sh in a copy of the repository whose train.py only says how it was started.

The shell files are the real ones. tunelib.config is a stand-in, but where a bad config must end the launch: there it is ours.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SHELL_FILES = ("run_train.sh", "scripts/make_env.sh", "scripts/run_tests.sh", ".ci/run")

CONFIG_STUB = """
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "world_size": os.environ.get("WORLD_SIZE")}))
if "--bad" in sys.argv:
    print("bad config", file=sys.stderr)
    sys.exit(2)
"""

TRAIN_STUB = """
import json, os, signal, sys, time
def leave(code):
    if "TUNELIB_EXIT_CODE_FILE" in os.environ:
        with open(os.environ["TUNELIB_EXIT_CODE_FILE"] + "." + os.environ["TORCHELASTIC_RESTART_COUNT"], "w") as file:
            file.write(str(code))
    sys.exit(code)
env = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
print(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), "python": sys.executable, **env}), flush=True)
if "--crash" in sys.argv and os.environ.get("RANK") == "1":
    raise RuntimeError("rank one fell over")
if "--wait" in sys.argv:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: leave(75))
    print("ready", flush=True)
    time.sleep(60)
leave(int(os.environ.get("STUB_EXIT", 0)))
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with the real launcher, a config checker and a train.py that only report, and two configs."""
    folder = tmp_path / "a repository"
    for name in ("run_train.sh", "scripts/make_env.sh", "tunelib/errors.py", "tunelib/parallel/launch.py", "pyproject.toml", "constraints.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, folder / name)
    (folder / "train.py").write_text(TRAIN_STUB)
    (folder / "tunelib" / "config").mkdir(parents=True)
    (folder / "tunelib" / "__init__.py").touch()
    (folder / "tunelib" / "parallel" / "__init__.py").touch()
    (folder / "tunelib" / "config" / "__init__.py").touch()
    (folder / "tunelib" / "config" / "__main__.py").write_text(CONFIG_STUB)
    (folder / "train_configs").mkdir()
    (folder / "train_configs" / "debug_model.toml").touch()
    (folder / "train_configs" / "other.toml").touch()
    return folder


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with the Python of the tests first on PATH, and no launch variables but those given."""
    ours = ("CONFIG", "CONFIG_FILE", "NGPU", "NNODES", "NODE_RANK", "LOG_RANK", "MAX_RESTARTS", "RDZV_ENDPOINT", "PYTHONPATH", "OMP_NUM_THREADS")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return {**inherited, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **variables}


def launch(repo: Path, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    command = [str(repo / "run_train.sh"), *words]
    return subprocess.run(command, cwd=cwd or repo, env=environment(**variables), capture_output=True, text=True, timeout=60)


def reports(done: subprocess.CompletedProcess) -> list[dict]:
    """What each shown train.py said."""
    return [json.loads(line[line.index("{") :]) for line in done.stdout.splitlines() if '"argv"' in line]


def test_words_reach_train_py_as_they_were_given(repo):
    words = ["--job.description", "two words", "--a", "", "--b=x=$y", '--c="quoted" \\ *']
    done = launch(repo, *words)
    assert (done.returncode, done.stderr) == (0, "")
    (report,) = reports(done)
    assert report["argv"] == ["train_configs/debug_model.toml", *words]
    assert (report["RANK"], report["WORLD_SIZE"]) == (None, None)


def test_no_words_need_no_array(repo):
    (report,) = reports(launch(repo))
    assert report["argv"] == ["train_configs/debug_model.toml"]


def test_the_current_directory_stays_and_the_repository_is_found(repo, tmp_path):
    here = tmp_path / "elsewhere"
    here.mkdir()
    (here / "mine.toml").touch()
    (here / "link.sh").symlink_to(Path("..") / repo.name / "run_train.sh")
    for script, variables, config in (
        (repo / "run_train.sh", {}, str(repo / "train_configs" / "debug_model.toml")),
        (here / "link.sh", {"CONFIG": "mine.toml"}, "mine.toml"),
        (Path("..") / repo.name / "run_train.sh", {"CONFIG": "./mine.toml"}, "./mine.toml"),
    ):
        done = subprocess.run([str(script)], cwd=here, env=environment(**variables), capture_output=True, text=True)
        (report,) = reports(done)
        assert (report["argv"], report["cwd"]) == ([config], str(here))


@pytest.mark.parametrize(
    ("variables", "words", "expected"),
    [
        ({"CONFIG": "other"}, [], ["train_configs/other.toml"]),
        ({"CONFIG": "other.toml"}, [], ["train_configs/other.toml"]),
        ({"CONFIG_FILE": "other"}, [], ["train_configs/other.toml"]),
        ({"CONFIG": "other", "CONFIG_FILE": "other"}, [], ["train_configs/other.toml"]),
        ({"CONFIG": "folder/my own.toml"}, [], ["folder/my own.toml"]),
        ({"CONFIG": "nowhere"}, [], ["nowhere"]),  # the config check says that it is missing
        ({}, ["--job.config_file", "x.toml"], ["--job.config_file", "x.toml"]),
    ],
)
def test_config_is_a_path_or_the_name_of_a_shipped_one(repo, variables, words, expected):
    (report,) = reports(launch(repo, *words, **variables))
    assert report["argv"] == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CONFIG": "a", "CONFIG_FILE": "b"}, "run_train.sh: CONFIG (a) and CONFIG_FILE (b) differ; give one"),
        ({"NGPU": "0"}, "run_train.sh: NGPU must be a whole number from 1 up, not '0'"),
        ({"NGPU": "two"}, "run_train.sh: NGPU must be a whole number from 1 up, not 'two'"),
        ({"MAX_RESTARTS": "-1"}, "run_train.sh: MAX_RESTARTS must be a whole number, not '-1'"),
        (
            {"NNODES": "2", "NODE_RANK": "0"},
            "run_train.sh: with NNODES=2, every machine needs NODE_RANK (0 to 1) and RDZV_ENDPOINT (host:port of machine 0)",
        ),
    ],
)
def test_a_mistake_in_the_environment_is_said(repo, variables, message):
    done = launch(repo, **variables)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{message}\n")


def test_exit_code_of_one_process_arrives(repo):
    assert launch(repo, STUB_EXIT="75").returncode == 75


def test_bad_config_ends_before_train_py(repo):
    for processes in ("1", "2"):
        done = launch(repo, "--bad", NGPU=processes)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "bad config\n")


def test_our_config_check_ends_a_launch_with_its_message(repo):
    shutil.rmtree(repo / "tunelib")
    (repo / "tunelib").symlink_to(REPO / "tunelib")
    shutil.copy(REPO / "train_configs" / "debug_model.toml", repo / "train_configs")
    done = launch(repo, "--training.stpes", "5", NGPU="2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "stpes" in done.stderr
    assert "steps" in done.stderr
    assert launch(repo).returncode == 0


def test_help_shows_the_config_help_and_starts_nothing(repo):
    done = launch(repo, "--help", NGPU="2", NNODES="3", NODE_RANK="0", RDZV_ENDPOINT="nowhere:1")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"argv": ["train_configs/debug_model.toml", "--help"], "world_size": "6"}


def test_two_processes_get_the_words_and_give_their_exit_code(repo, tmp_path):
    done = launch(repo, "--x", "two words", NGPU="2", LOG_RANK="0,1", STUB_EXIT="75", TMPDIR=str(tmp_path))
    assert done.returncode == 75
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = sorted(reports(done), key=lambda report: report["RANK"])
    assert [report["RANK"] for report in said] == ["0", "1"]
    for report in said:
        assert report["argv"] == ["train_configs/debug_model.toml", "--x", "two words"]
        assert report["WORLD_SIZE"] == "2"
        assert int(report["OMP_NUM_THREADS"]) == max(1, processors // 2)
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("tunelib.*"))


def test_a_crash_of_a_hidden_rank_is_shown(repo):
    done = launch(repo, "--crash", NGPU="2")
    assert done.returncode == 1
    assert len(reports(done)) == 1
    assert "RuntimeError: rank one fell over" in done.stderr


@pytest.mark.parametrize(("processes", "number"), [("1", signal.SIGTERM), ("2", signal.SIGTERM), ("2", signal.SIGUSR1)])
def test_signals_reach_train_py(repo, tmp_path, processes, number):
    output = tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen([str(repo / "run_train.sh"), "--wait"], cwd=repo, env=environment(NGPU=processes, LOG_RANK="0,1"), stdout=file)
        try:
            limit = time.monotonic() + 30
            while output.read_text().count("ready") < int(processes) and time.monotonic() < limit:
                time.sleep(0.1)
            process.send_signal(number)
            assert process.wait(timeout=30) == 75
        finally:
            process.kill()


@pytest.fixture
def bare_python(repo: Path, tmp_path: Path) -> Path:
    """A folder for PATH whose python3 sees no packages, and makes environments in which pip only writes down its words."""
    folder = tmp_path / "bare"
    folder.mkdir()
    log = tmp_path / "pip.log"
    made = folder / "python_of_venv"
    made.write_text(f'#!/bin/sh\nif [ "$2" = pip ]; then sleep 0.5; echo "$@" >>"{log}"; exit "${{PIP_CODE:-0}}"; fi\nexec "{sys.executable}" "$@"\n')
    bare = folder / "python3"
    bare.write_text(
        "#!/bin/sh\n"
        f'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$4/bin" && echo "venv" >>"{log}" && cp "{made}" "$4/bin/python"\n'
        f'elif [ "$3" = missing ]; then "{sys.executable}" -S "$@" | sed "1s|.*|$0|"\n'
        f'else exec "{sys.executable}" "$@"; fi\n'
    )
    made.chmod(0o755)
    bare.chmod(0o755)
    return folder


def path_of(folder: Path) -> str:
    return f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin"


def test_missing_packages_make_an_environment_once(repo, tmp_path, bare_python):
    log = tmp_path / "pip.log"
    first = launch(repo, PATH=path_of(bare_python))
    assert first.returncode == 0, first.stderr
    assert f"lacks torch tyro safetensors huggingface_hub tokenizers sentencepiece jinja2 numpy tqdm pyyaml zlib-ng: making {repo}/.venv" in re.sub(
        r"\btomli ", "", first.stderr
    )
    assert len(reports(first)) == 1
    venv, torch, rest = log.read_text().splitlines()
    assert venv == "venv"
    assert torch.endswith(" torch==2.13.0")  # first and alone
    assert f"-c {repo}/constraints.txt" in rest
    assert "tyro>=1.0" in (repo / ".venv" / "tunelib-requirements.txt").read_text()

    second = launch(repo, PATH=path_of(bare_python))
    assert (second.returncode, second.stderr) == (0, "")
    assert len(log.read_text().splitlines()) == 3

    with (repo / "constraints.txt").open("a") as file:
        file.write("tyro==1.0.1\n")
    assert launch(repo, PATH=path_of(bare_python)).returncode == 0
    assert len(log.read_text().splitlines()) == 5  # installed again into the same environment


def test_interrupted_environment_is_made_anew(repo, tmp_path, bare_python):
    broken = launch(repo, PATH=path_of(bare_python), PIP_CODE="1")
    assert broken.returncode == 1
    assert reports(broken) == []
    assert launch(repo, PATH=path_of(bare_python)).returncode == 0
    assert (tmp_path / "pip.log").read_text().split("\n").count("venv") == 2


def test_two_starts_make_one_environment(repo, tmp_path, bare_python):
    command, env = [str(repo / "run_train.sh")], environment(PATH=path_of(bare_python))
    pair = [subprocess.Popen(command, cwd=repo, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    messages = [process.communicate(timeout=30)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert (tmp_path / "pip.log").read_text().split("\n").count("venv") == 1
    assert sum("waiting: another process is making .venv" in message for message in messages) == 1


def test_no_python_is_said(repo, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "readlink", "env"):
        (tools / name).symlink_to(shutil.which(name) or "")
    done = launch(repo, PATH=str(tools))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "tunelib needs Python 3.10 or newer, and found none on PATH\n"


def test_users_marker_expression_wins_over_the_default():
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-m", "slow", str(Path(__file__))]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 5, done.stdout  # nothing here is slow: all of this file is left out


@pytest.mark.parametrize("name", SHELL_FILES)
def test_shell_files_keep_to_bash_3(name):
    """What macOS's bash 3.2 lacks: it cannot be installed here, so the known traps are looked for."""
    text = "\n".join(line for line in (REPO / name).read_text().splitlines() if not line.lstrip().startswith("#"))
    assert subprocess.run(["bash", "-n", str(REPO / name)], capture_output=True).returncode == 0
    traps = {
        r"\$\{\w+(,,?|\^\^?)": "case conversion",
        r"\b(mapfile|readarray|coproc)\b": "bash 4 builtins",
        r"\b(declare|local|typeset) -[Anlu]": "associative arrays, name references, case attributes",
        r"readlink -f|\brealpath\b": "GNU tools",
        r"&>>|\|&": "bash 4 redirections",
        r"\$\{\w+\[[@*]\]\}|\$\{\w+@\w\}": "arrays, which are unbound under set -u when empty; transformations",
        r"\[\[ -v|wait -[nf]|;;&|;&": "bash 4 syntax",
    }
    found = {meaning: re.findall(trap, text) for trap, meaning in traps.items() if re.search(trap, text)}
    assert not found
