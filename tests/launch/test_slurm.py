"""Studies on a real Slurm of two emulated nodes."""

import pytest
from slurm_cluster import wait_until

pytestmark = pytest.mark.slow


def test_the_cluster_has_two_nodes_that_see_each_other_and_keeps_account(slurm):
    said = slurm.command(
        "srun", "-N2", "bash", "-c", "getent hosts $SLURMD_NODENAME >&2; echo $SLURMD_NODENAME $SLURM_PROCID"
    )
    assert sorted(said.split()) == sorted([*slurm.nodes, "0", "1"])
    job = slurm.command("sbatch", "--parsable", "--wrap", "exit 3", "--output", "/dev/null").strip()
    ask = ("sacct", "--noheader", "--parsable2", "-X", "-o", "State,ExitCode", "-j", job)
    wait_until(lambda: slurm.command(*ask).strip() == "FAILED|3:0", "accounting knows how the job ended", 30)
