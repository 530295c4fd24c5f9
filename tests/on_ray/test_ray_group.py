"""The group that Ray makes for workers ends with its threads, before Ray ends the workers."""

import pytest


@pytest.mark.long
def test_no_thread_outlives_the_group_of_ray_workers(cluster, s3_uri: str) -> None:  # type: ignore[no-untyped-def]
    values = ("--train.epochs=0.25", "--cluster.workers=2", f"--run.storage={s3_uri}")
    code, output = cluster.run(
        "python", "tests/on_ray/group_job.py", "--config=jobs/configs/smoke.yaml", *values
    )
    assert code == 0, output
    assert "threads left: [0, 0]" in output
