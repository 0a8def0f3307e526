"""The job scripts where a Slurm on one machine cannot show what they do: its programs are stubs that note calls."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if "#SBATCH" in path.read_text())

STUBS = {
    # a task ends with the code of the file SRUN_CODE; training writes a checkpoint before it does
    "srun": """
printf '%q ' "$@" >>"$CALLS/srun"; echo >>"$CALLS/srun"; env >"$CALLS/env"
if [[ "$*" == *show_recipe.py*--key* ]]; then echo "$RUN"; exit "${KEY_CODE:-0}"; fi
if [[ "$*" == *treg_megatron.train* ]]; then
    if [[ -n ${SAVES:-} ]]; then mkdir -p "$RUN/checkpoints/step_1"; touch "$RUN/checkpoints/step_1/treg.json"; fi
    exit "${TRAIN_CODE:-0}"
fi
""",
    "scontrol": """
case "$1 $2" in
    "show hostnames") for ((i = 1; i <= ${NODE_COUNT:-2}; i++)); do echo "node$i"; done ;;
    "show job") cat "$CALLS/job" ;;
    requeue*) echo "$*" >>"$CALLS/requeue"; if [[ -n ${FORBIDDEN:-} ]]; then exit 1; fi; kill -TERM $PPID ;;
esac
""",
    "sbatch": """
if [[ -n ${NO_SBATCH:-} ]]; then echo "sbatch: error: not from here" >&2; exit 1; fi
printf '%s\\n' "$@" >>"$CALLS/sbatch"; env >"$CALLS/sbatch-env"; echo 99
""",
    "scancel": 'echo "$*" >>"$CALLS/scancel"',
}
JOB = """\
JobId=7 JobName=treg_70b
   Priority=4294901757 Nice=0 Account=vision QOS=N/A
   RunTime=00:00:03 TimeLimit=02:00:00 TimeMin=N/A
   Partition=large AllocNode:Sid=login:1
   ReqNodeList=(null) ExcNodeList=node[7,9]
   NumNodes=2 NumCPUs=384 NumTasks=16
   MinCPUsNode=96 MinMemoryNode=0 MinTmpDiskNode=0
   Features=h100&nvlink DelayBoot=00:00:00
   OverSubscribe=NO Contiguous=0 Licenses=(null) Network=(null)
   Command={command}
   WorkDir=/somewhere
"""


class Done(NamedTuple):
    code: int
    said: str
    calls: Path

    def called(self, program: str) -> list[str]:
        path = self.calls / program
        return path.read_text().splitlines() if path.exists() else []

    def variable(self, name: str, program: str = "env") -> str | None:
        return next((line.split("=", 1)[1] for line in self.called(program) if line.startswith(f"{name}=")), None)


@pytest.fixture
def job(tmp_path):
    """Run a script of slurm/, or commands after common.sh, as the batch script of job 7 on two nodes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in STUBS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (programs / name).chmod(0o755)

    def run(script: Path | str, *arguments: str, site: str = "", **variables: str) -> Done:
        (tmp_path / "site.sh").write_text(site)
        command = shlex.join(["bash", str(script), *arguments]) if isinstance(script, Path) else script
        (tmp_path / "job").write_text(JOB.format(command=" ".join([str(script), *arguments])))
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(tmp_path),
            "RUN": str(tmp_path / "run"),
            "TREG": str(ROOT),
            "SITE": str(tmp_path / "site.sh"),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "treg_70b",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS_PER_NODE": "8",
        }
        done = subprocess.run(
            ["bash", "-c", command if isinstance(script, Path) else f"RECIPE=tiny; source slurm/common.sh; {command}"],
            env=environment | variables,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
        return Done(done.returncode, done.stdout, tmp_path)

    return run


TRAIN = ROOT / "slurm" / "treg_70b.sh"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_signal_is_asked_for_only_where_something_handles_it(script):
    """`train` and `launch` requeue a job that the signal stopped; an import that it stopped would begin again."""
    text = script.read_text()
    assert ("#SBATCH --signal=USR1@" in text) == ("\ntrain " in text or "\nlaunch " in text)


def test_a_node_list_longer_than_a_pipe_holds(job):
    done = job('echo "first: $MASTER_ADDR"', NODE_COUNT="20000")
    assert (done.code, done.said) == (0, "first: node1\n")


def test_what_the_site_file_sets_and_how_it_may_fail(job):
    site = "false\necho $never_set | false\nMASTER_ADDR=node1-ib0 MASTER_PORT=29500\nexport NCCL_SOCKET_IFNAME=ib0\n"
    done = job('once true; echo "$-"; set -o | grep pipefail', site=site)
    options, pipefail = done.said.splitlines()
    assert done.code == 0 and {"e", "u"} <= set(options) and pipefail.split() == ["pipefail", "on"]
    found = {name: done.variable(name) for name in ("MASTER_ADDR", "MASTER_PORT", "NCCL_SOCKET_IFNAME")}
    assert found == {"MASTER_ADDR": "node1-ib0", "MASTER_PORT": "29500", "NCCL_SOCKET_IFNAME": "ib0"}


def test_an_address_from_another_job_is_not_used(job):
    assert job("once true", MASTER_ADDR="node99").variable("MASTER_ADDR") == "node1"


def test_the_variables_reach_the_ranks_of_a_job_without_an_environment(job):
    """sbatch --export=NONE sets SLURM_EXPORT_ENV, which srun obeys."""
    assert job("once true", SLURM_EXPORT_ENV="NONE").variable("SLURM_EXPORT_ENV") is None


def test_neighbouring_ranks_are_on_one_node(job):
    [call] = job("ranks true").called("srun")
    assert "--distribution=block" in call.split()


def test_an_image_is_imported_once_where_that_is_allowed(job):
    image = {"CONTAINER_IMAGE": "nvcr.io#nvidia/nemo:25.11"}
    for call in job("once true; ranks true", **image).called("srun"):
        assert "--container-name=treg-7" in call.split()
    assert "container-name" not in job("once true", **image, CONTAINER_NAME="").called("srun")[-1]


def test_convert_says_how_it_is_used(job):
    done = job(ROOT / "slurm" / "convert.sh")
    assert done.code == 2 and done.said == "usage: sbatch slurm/convert.sh import|export [section.key=value ...]\n"


def test_recipes_are_found_from_elsewhere(job, tmp_path):
    """Also where RECIPE is the path that it has in the repository."""
    assert "--recipe llama3_70b " in job(TRAIN, CHECKS="").called("srun")[0]
    (tmp_path / "srun").unlink()
    done = job("cd /; RECIPE=recipes/tiny.yaml; source $TREG/slurm/common.sh; setting run")
    assert f"--recipe {ROOT}/recipes/tiny.yaml " in done.called("srun")[0]


def test_the_pipeline_finds_its_repository_from_anywhere(job, tmp_path):
    script = tmp_path / "a clone" / "slurm" / "pipeline_70b.sh"
    (tmp_path / "a clone").symlink_to(ROOT)
    done = job(f"cd /; env -u TREG bash '{script}'; :")
    submitted = [line for line in done.called("sbatch") if line.startswith("/")]
    stations = ("label_70b", "index", "treg_70b", "convert")
    assert submitted == [f"{tmp_path}/a clone/slurm/{station}.sh" for station in stations]
    assert done.variable("TREG", "sbatch-env") == f"{tmp_path}/a clone"


def test_the_pipeline_ends_with_an_evaluation_where_that_is_wanted(job):
    done = job(f"env -u TREG EVALUATE=yes bash {ROOT}/slurm/pipeline_70b.sh evaluate.prompts=p.json; :")
    submitted = done.called("sbatch")
    assert submitted[-2:] == [f"{ROOT}/slurm/evaluate.sh", "evaluate.prompts=p.json"]
    assert submitted[-4:-2] == ["--dependency=afterok:99", "--kill-on-invalid-dep=yes"]
    assert done.said.endswith(", export 99, evaluate 99\n")


# -- evaluation

EVALUATE = ROOT / "slurm" / "evaluate.sh"


def steps(done: Done) -> list[list[str]]:
    """Words of the steps that ran a tool other than those that look up a setting."""
    calls = [shlex.split(call) for call in done.called("srun")]
    return [call for call in calls if "tools/" in " ".join(call) and not any("show_recipe" in word for word in call)]


def test_an_evaluation_answers_on_all_ranks(job):
    done = job(EVALUATE, "evaluate.prompts=p.json")
    [answers] = steps(done)
    assert done.code == 0 and {"--nodes=2", "--ntasks=16"} <= set(answers)
    expected = [f"{ROOT}/tools/generate_answers.py", "--recipe", "llama3_8b", "evaluate.prompts=p.json"]
    assert answers[-4:] == expected


def test_an_evaluation_judges_and_compares_with_one_task(job, tmp_path):
    done = job(EVALUATE, "judge.baseline=b", JUDGE="yes", COMPARE="runs/b runs/c")
    answers, judge, compare = steps(done)
    assert "--ntasks=16" in answers and {"--nodes=1", "--ntasks=1"} <= set(judge) & set(compare)
    assert judge[-4:] == [f"{ROOT}/tools/judge_answers.py", "--recipe", "llama3_8b", "judge.baseline=b"]
    run = f"{tmp_path}/run"
    expected = [f"{ROOT}/tools/compare_arms.py", run, "runs/b", "runs/c", "--output", f"{run}/evaluate/comparison"]
    assert compare[-6:] == expected


# -- signals


@pytest.mark.parametrize("phase", [{"KEY_CODE": "138"}, {"TRAIN_CODE": "86"}, {"TRAIN_CODE": "138"}])
def test_a_signal_before_there_is_anything_to_save(phase, job):
    done = job(TRAIN, CHECKS="", **phase)
    assert "before there was anything to save" in done.said and "everything saved" not in done.said
    assert done.called("requeue") == ["requeue 7"]


@pytest.mark.parametrize("restarts, requeued", [("1", False), ("0", True)])
def test_requeues_without_progress_are_limited(restarts, requeued, job, tmp_path):
    """The count is of this job alone: one that starts for the first time begins at 0."""
    (tmp_path / "treg_70b-7.requeues").write_text("3\n")
    done = job(TRAIN, CHECKS="", TRAIN_CODE="138", SLURM_RESTART_COUNT=restarts)
    assert (done.called("requeue") == ["requeue 7"]) == requeued
    assert requeued or (done.code == 138 and "not requeued: 4 times in a row without progress" in done.said)


def test_progress_allows_the_next_requeue(job, tmp_path):
    (tmp_path / "treg_70b-7.requeues").write_text("3\n")
    done = job(TRAIN, CHECKS="", TRAIN_CODE="85", SAVES="yes", SLURM_RESTART_COUNT="57")
    assert done.called("requeue") == ["requeue 7"] and (tmp_path / "treg_70b-7.requeues").read_text() == "0\n"
    assert "stopped by a signal, everything saved" in done.said


def test_where_requeueing_is_forbidden(job):
    done = job(TRAIN, "model.hf=/a b", CHECKS="", TRAIN_CODE="85", SAVES="yes", FORBIDDEN="yes")
    assert done.code == 85
    assert done.said.endswith(f"may not be requeued; submit it again to go on: sbatch {TRAIN} model.hf=/a\\ b\n")


def test_the_warning_time_is_told(job):
    assert job("once true").variable("SIGNAL_SECONDS") == "600"
    assert job("once true", SBATCH_SIGNAL="USR1@1140").variable("SIGNAL_SECONDS") == "1140"


# -- the chain


def test_the_successor_keeps_the_options_and_a_path_with_a_space(job, tmp_path):
    clone = tmp_path / "a clone"
    clone.symlink_to(ROOT)
    script = clone / "slurm" / "treg_70b.sh"
    variables = {"CHECKS": "", "CHAIN": "2", "MASTER_PORT": "29500", "SLURM_GPUS_PER_NODE": "4"}
    done = job(script, "train.max_steps=5", "model.hf=/a b", **variables)
    *options, path, first, second = done.called("sbatch")
    assert [path, first, second] == [str(script), "train.max_steps=5", "model.hf=/a b"]
    assert options == [
        *("--parsable", "--dependency=afternotok:7", "--kill-on-invalid-dep=yes", "--nodes=2", "--job-name=treg_70b"),
        *("--partition=large", "--account=vision", "--time=02:00:00", "--constraint=h100&nvlink"),
        *("--exclude=node[7,9]", "--mem=0", "--ntasks-per-node=8", "--gpus-per-node=4"),
    ]
    assert done.variable("CHAIN", "sbatch-env") == "1" and done.variable("MASTER_PORT", "sbatch-env") is None


def test_without_a_successor_where_nodes_may_not_submit(job):
    done = job(TRAIN, CHECKS="", CHAIN="1", NO_SBATCH="yes")
    assert done.code == 0 and "no successor: jobs cannot be submitted from this node" in done.said
    assert any("treg_megatron.train" in call for call in done.called("srun"))


def test_a_job_that_is_refused_cancels_its_successor(job):
    """Also the one that it submitted before it was requeued."""
    assert job(TRAIN, CHECKS="", CHAIN="1", TRAIN_CODE="2").called("scancel") == ["99"]
    done = job(TRAIN, CHECKS="", CHAIN="1", TRAIN_CODE="2", SLURM_RESTART_COUNT="1")
    assert done.called("scancel") == ["99", "99"] and done.called("sbatch").count("--parsable") == 1


# -- seeds


def test_each_job_of_an_array_trains_with_its_seed_into_its_own_folder(job, tmp_path):
    done = job(ROOT / "slurm" / "seeds.sh", "train.seed=99", CHECKS="", SLURM_ARRAY_TASK_ID="3")
    [call] = [call for call in done.called("srun") if "treg_megatron.train" in call]
    expected = f"train.seed=99 train.seed=3 data.seed=3 train.output={tmp_path}/run-seed3"
    assert done.code == 0 and call.strip().endswith(expected)


@pytest.mark.parametrize("variables", [{}, {"SLURM_ARRAY_TASK_ID": "3", "CHAIN": "1"}])
def test_a_job_without_a_seed_is_refused(variables, job):
    done = job(ROOT / "slurm" / "seeds.sh", **variables)
    assert done.code == 2 and done.said.startswith("error: slurm/seeds.sh takes its seed") and not done.called("srun")
