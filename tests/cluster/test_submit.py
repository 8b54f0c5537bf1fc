"""`dsmim submit` without a Slurm; tests/slurm has the rest."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from dsmim.cli.main import main
from dsmim.cluster import TEMPLATES
from dsmim.cluster.profile import Profile, load_profile
from dsmim.cluster.script import Job, render, template_folder
from dsmim.cluster.slurm import end_of_job, job_of, limit_seconds
from dsmim.cluster.submit import overridden
from tests.conftest import ROOT, make_shards, tiny_recipe


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A user's folder with shards and r.yaml, on a machine without Slurm."""
    make_shards(tmp_path / "shards", [9, 7])
    make_shards(tmp_path / "shards", [5], name="val")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tiny_recipe(tmp_path / "shards")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def submit(capsys, *words: str, ranks: tuple[int, int] = (2, 4), time: str = "24:00:00") -> tuple[int, str, str]:
    """Make a dry run; return its exit code, standard output and standard error."""
    nodes, gpus = map(str, ranks)
    code = main(["submit", *words, "--nodes", nodes, "--gpus-per-node", gpus, "--time", time, "--dry-run"])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def options_of(script: str) -> dict[str, str]:
    """Return the #SBATCH options that Slurm reads: those before the first command."""
    found = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH --"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[name] = value
        elif line and not line.startswith("#"):
            break
    return found


def test_a_dry_run_prints_a_whole_script_and_writes_nothing(home, capsys):
    before = sorted(home.rglob("*"))
    code, script, _ = submit(capsys, "r.yaml", "--set", "optim.lr=2e-3", "seed=4", "--run-dir", "runs/a b")
    assert code == 0 and sorted(home.rglob("*")) == before
    options = options_of(script)
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("2", "4", "4")
    assert (options["time"], options["signal"], options["chdir"]) == ("24:00:00", "B:USR1@300", str(home))
    assert options["output"] == f'"{home}/runs/a b/slurm/%x-%j.out"' and options["job-name"] == "tiny"
    arguments = shlex.split(re.search(r"^set -- (.*)$", script, re.M)[1])
    assert arguments[1:] == ["--run-dir", f"{home}/runs/a b"] and arguments[0].startswith(f"{home}/runs/a b/slurm/")
    assert subprocess.run(["/bin/bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_job_without_slurm_is_refused(home, capsys):
    assert main(["submit", "r.yaml", "--nodes", "1", "--gpus-per-node", "1", "--time", "60"]) == 1
    assert "no sbatch on this machine" in capsys.readouterr().err
    assert not (home / "runs").exists()


def test_all_problems_are_reported_at_once(home, capsys):
    (home / "config/dsmim").mkdir(parents=True)
    (home / "config/dsmim/site.yaml").write_text("acount: me\nsignal_seconds: 5\nsrun: [exclusive]\n")
    (home / "ds.json").write_text('{"zero_optimisation": {"stage": 3}, "gradient_clipping": 1.0}')
    (home / "shards/train-001.tar.dsmi").unlink()
    (home / "file").write_text("")
    code, _, error = submit(
        capsys, "r.yaml", "--profile", "site", "--run-dir", "file/run", "batch.micro_batch=4", "model.name=swinv2_nan0",
        "model.weights=/nowhere", "engine.deepspeed=ds.json", "data.val=/nowhere/*.tar", time="3h",
    )  # fmt: skip
    assert code == 1
    for problem in (
        "swinv2_nan0", "8 is not a multiple of 8 ranks × micro batch 4 = 32", "zero_optimisation: DeepSpeed reads no",
        "gradient_clipping: the file says 1.0, the recipe 5.0", "train-001.tar: ", "no shards match '/nowhere/*.tar'",
        "file/run: cannot be written", "model.weights: /nowhere", "acount: unknown key; did you mean account?",
        "signal_seconds: ", "srun[0]: ", "--time: '3h' is none of",
    ):  # fmt: skip
        assert error.count(problem) == 1, (problem, error)
    assert re.match(r"dsmim: error: not submitted: \d+ problems:\n  ", error)


def test_recipe_errors_are_reported_with_the_others(home, capsys):
    code, _, error = submit(capsys, "r.yaml", "optim.lrr=1", "bach.x=2", "--profile", "none", time="0")
    assert code == 1 and "optim.lrr: unknown key; did you mean lr?" in error and "bach: unknown key" in error
    assert "profile 'none': no such file" in error and "--time: '0' is zero" in error


def test_odd_micro_batches_cannot_be_mixed(home, capsys):
    words = ("r.yaml", "task={name: classify, num_classes: 3, mixup: 0.8}")
    code, _, error = submit(capsys, *words)
    assert code == 1 and "batch.micro_batch: mixup and CutMix pair neighbours; 1 samples are odd" in error
    assert submit(capsys, *words, ranks=(1, 4))[0] == 0


def test_the_time_limit_must_leave_time_for_training(home, capsys):
    code, _, error = submit(capsys, "r.yaml", time="5")
    assert code == 1 and "the last 300 s are kept for saving" in error
    assert submit(capsys, "r.yaml", time="6")[0] == 0


def test_a_run_with_another_recipe_needs_fork(home, capsys):
    saved = home / "run/checkpoints/step_00000002"
    saved.mkdir(parents=True)
    from dsmim.checkpoint.reading import STATE_FORMAT
    from dsmim.data.from_recipe import training_shards
    from dsmim.recipe.reading import load_recipe
    from dsmim.shards.index import fingerprint

    recipe = load_recipe("r.yaml")
    state = {"format": STATE_FORMAT, "recipe": recipe.model_dump(mode="json")}
    state["data_fingerprint"] = fingerprint(training_shards(recipe.data))
    (saved / "state.json").write_text(json.dumps(state))
    same = ("r.yaml", "--run-dir", "run")
    assert submit(capsys, *same, "data.workers=4")[0] == 0
    code, _, error = submit(capsys, *same, "optim.lr=2e-3")
    assert code == 1 and "optim.lr: 0.001 → 0.002" in error and "--fork" in error
    code, script, _ = submit(capsys, *same, "optim.lr=2e-3", "--fork")
    assert code == 0 and script.count(" --fork\n") == 1
    make_shards(home / "shards", [9, 8])
    code, _, error = submit(capsys, *same)
    assert code == 1 and "the shards are not those the run was started with" in error
    code, script, _ = submit(capsys, "run", "batch.eval_batch=2", "--template", "evaluate")
    assert code == 0 and f"set -- {home}/run batch.eval_batch=2\n" in script and "--signal" not in script
    assert submit(capsys, "shards", "--template", "evaluate")[2].count("shards: contains no checkpoint") == 1


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_can_be_filled_in(template):
    profile = Profile(
        account="a", partition="p", qos="q", constraint="ib", reservation="r", gpu_type="h100", cpus_per_task=3,
        mem="9G", modules=["cuda", "gcc"], setup=["cd /x"], env={"A": "it's $HOME"}, sbatch=["--exclusive"],
        srun=["--label"], signal_seconds=600, restarts=7,
    )  # fmt: skip
    job = Job(template, 3, 2, "1-12", "name", "%j.out", Path("/x y"), ("RECIPE", "key=a b"))
    script = render(job, profile)
    options = options_of(script)
    expected = {
        "nodes": "3", "ntasks-per-node": "2", "gpus-per-node": "h100:2", "cpus-per-task": "3", "time": "1-12",
        "account": "a", "partition": "p", "qos": "q", "constraint": "ib", "reservation": "r", "mem": "9G",
        "exclusive": "", "requeue": "", "open-mode": "append", "chdir": '"/x y"',
    } | ({} if template == "evaluate" else {"signal": "B:USR1@600"})  # fmt: skip
    assert expected.items() <= options.items()
    probe = script.replace("module load cuda gcc\n", "").replace("cd /x\n", "")
    end = probe.index("# ---- end of site")
    shown = subprocess.run(
        ["/bin/bash", "-c", probe[:end] + 'printf "%s|" "$@" "$A" "$DSMIM_RESTARTS" "${srun_options[*]:-none}"'],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert shown == f"RECIPE|key=a b|it's $HOME|7|{'none' if template == 'pretrain_mpirun' else '--label'}|"


def test_a_container_goes_before_the_command_or_is_refused():
    job = Job("pretrain_deepspeed", 1, 1, "60", "n", "o", Path("/"), ())
    inside = Profile(container="apptainer exec --nv 'my image.sif'")
    with pytest.raises(ValueError, match="container: pretrain_deepspeed starts its launcher in the batch shell"):
        render(job, inside)
    script = render(Job("pretrain", 1, 1, "60", "n", "o", Path("/"), ()), inside)
    assert "container=(apptainer exec --nv 'my image.sif')\n" in script
    with pytest.raises(ValueError, match="is not a shell command"):
        Profile(container="apptainer 'x")


def test_the_example_profile_is_valid_and_shows_every_key():
    path = ROOT / "slurm/profiles/example.yaml"
    profile = load_profile(str(path))
    assert profile.gpu_type == "h100" and profile.env == {"NCCL_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "1"}
    shown = set(re.findall(r"^(?:# )?(\w+):", path.read_text(), re.M))
    assert shown == set(Profile.model_fields)


def test_variables_that_would_replace_options_are_reported():
    script = "#SBATCH --time=60\n#SBATCH --exclusive\n"
    problems = overridden(script, {"SBATCH_TIMELIMIT": "5", "SBATCH_PARTITION": "x"})
    assert problems == ["SBATCH_TIMELIMIT=5 in the environment would replace --time=60; unset it"]
    assert overridden(script, {"SBATCH_TIMELIMIT": "60"}) == []


def test_variables_that_would_contradict_the_script_are_reported():
    job = Job("pretrain", 2, 4, "60", "name", "%j.out", Path("/x"), ())
    script = render(job, Profile(mem="9G"))
    asked = {
        "SBATCH_NO_REQUEUE": "1", "SBATCH_ARRAY_INX": "0-3", "SBATCH_JOB_NAME": "mine", "SBATCH_WAIT": "",
        "SBATCH_MEM_PER_CPU": "1G", "SBATCH_GPUS": "1", "SBATCH_ERROR": "%j.err", "SBATCH_GRES": "gpu:1",
    }  # fmt: skip
    harmless = {"SBATCH_ACCOUNT": "me", "SBATCH_PARTITION": "gpu", "SBATCH_QOS": "high", "SBATCH_EXPORT": "NONE"}
    problems = overridden(script, asked | harmless)
    assert [problem.split("=")[0] for problem in problems] == [
        "SBATCH_ARRAY_INX", "SBATCH_NO_REQUEUE", "SBATCH_WAIT", "SBATCH_ERROR", "SBATCH_GPUS", "SBATCH_GRES",
        "SBATCH_MEM_PER_CPU", "SBATCH_JOB_NAME",
    ]  # fmt: skip
    assert "SBATCH_JOB_NAME=mine in the environment would replace --job-name=name; unset it" in problems
    assert "SBATCH_MEM_PER_CPU=1G in the environment would contradict --mem=9G; unset it" in problems
    assert overridden(script, harmless | {"SBATCH_MEM_PER_NODE": "9G"}) == []
    assert overridden(render(job, Profile()), {"SBATCH_MEM_PER_CPU": "1G"}) == []


def test_the_batch_shell_finds_the_run_directory(tmp_path):
    (tmp_path / "mine.yaml").write_text("# comment\nname: 'mine-1'   # comment\ntask: {name: simmim}\n")
    supervise = template_folder() / "supervise.sh"
    for words, folder in (
        ("mine.yaml", "runs/mine-1"),
        ("demo_pretrain seed=2", "runs/demo_pretrain"),
        ("mine.yaml --run-dir a/b seed=1", "a/b"),
        ("mine.yaml --run-dir=a/b", "a/b"),
        ("mine.yaml --run-dir=a seed=1 --run-dir a/seed=1", "a/seed=1"),
    ):
        script = f"set -u; SLURM_JOB_ID=1; source {supervise}; follow {words}; echo $dsmim_run"
        done = subprocess.run(["/bin/bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == (f"{folder}\n", ""), words


def test_no_template_expands_an_empty_array_in_a_way_that_old_shells_refuse():
    """bash before 4.4 takes "${a[@]}" of an empty array for an unset variable, and `set -u` ends the job."""
    for path in (*template_folder().glob("*.sbatch"), template_folder() / "pipeline.sh"):
        text = path.read_text()
        for name in ("container", "srun_options", "options"):
            every = text.count(f"{{{name}[")
            guarded = 2 * text.count(f'${{{name}[@]+"${{{name}[@]}}"}}') + text.count(f"{{{name}[*]-}}")
            assert every == guarded, (path, name)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-12", 216000), ("1-0:30", 88200), ("1-1:1:1", 90061),
     ("UNLIMITED", None)],
)  # fmt: skip
def test_limits_are_read_as_slurm_reads_them(text, seconds):
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "4h", "1:2:3:4", "-5", "1.5", "0", "0:00", "two"])
def test_bad_limits(text):
    with pytest.raises(ValueError, match="--time"):
        limit_seconds(text)


def test_the_end_of_a_job_is_taken_from_the_environment_or_unknown(tmp_path):
    assert end_of_job({}) is None
    assert end_of_job({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1764000000"}) == 1764000000.0
    for nonsense in ("", "0", "soon", "99999999999999999"):
        assert end_of_job({"SLURM_JOB_END_TIME": nonsense}) is None
    assert end_of_job({"SLURM_JOB_ID": "7", "PATH": str(tmp_path)}) is None  # no squeue
    assert end_of_job({"SLURM_JOB_ID": "7; reboot"}) is None


def test_a_task_of_an_array_is_not_the_array():
    assert job_of({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}) == "12_3"
    assert job_of({"SLURM_JOB_ID": "12"}) == "12" and job_of({}) is None


def test_the_permission_for_commands_is_passed_on(home, capsys):
    """The recipe file of the job cannot hold it."""
    for words, passed in (((), False), (("data.allow_pipe=true",), True)):
        code, script, _ = submit(capsys, "r.yaml", *words)
        arguments = shlex.split(re.search(r"^set -- (.*)$", script, re.MULTILINE)[1])
        assert code == 0 and ("data.allow_pipe=true" in arguments) == passed
