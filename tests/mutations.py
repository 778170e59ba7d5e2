"""The mechanisms of recovery, each with how to switch it off and the test that then fails.

docs/reliability.md names these tests: a promise counts there only while its test can fail.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutation:
    mechanism: str
    file: str
    """Below the root of the project."""
    old: str
    """What stands there, exactly once."""
    new: str
    caught_by: str
    """The test, as pytest names it below `tests`."""


MUTATIONS = (
    Mutation(
        "only the run that owns the row ends it",
        "shared/headrace_shared/store/runs.sql",
        "WHERE j.id = e.job_id AND j.run = e.run AND j.state = 'running'",
        "WHERE j.id = e.job_id AND j.state = 'running'",
        "test_claim_and_lease.py::test_a_run_that_was_overtaken_ends_nothing",
    ),
    Mutation(
        "only the run that owns the row may call",
        "shared/headrace_shared/store/runs.sql",
        "JOIN headrace.jobs j ON j.id = i.job_id AND j.run = i.run AND j.state = 'running'",
        "JOIN headrace.jobs j ON j.id = i.job_id",
        "test_claim_and_lease.py::test_a_run_that_was_overtaken_may_make_no_call",
    ),
    Mutation(
        "no call goes out on a hold of an older epoch",
        "shared/headrace_shared/store/migrations/0001_initial.sql",
        "RETURN (SELECT epoch = expected FROM headrace.money);",
        "RETURN true;",
        "test_budget_holds.py::test_no_call_goes_out_on_a_hold_of_an_older_epoch",
    ),
    Mutation(
        "an answer that came late is not paid for again",
        "workers/headrace_workers/steps/guard.py",
        "return run if run.job.answer is None else run.ended(Succeeded())",
        "return run if run else run.ended(Succeeded())",
        "test_claim_and_lease.py::test_an_answer_that_comes_after_the_reaper_is_booked_and_not_paid_for_again",
    ),
    Mutation(
        "the calls of a dead worker stand in suspense",
        "shared/headrace_shared/store/migrations/0002_recovery.sql",
        "state = 'suspense', suspense_nano = c.held_nano,",
        "state = 'failed', suspense_nano = 0,",
        "test_claim_and_lease.py::test_the_reaper_takes_back_what_a_dead_worker_held",
    ),
    Mutation(
        "an intent that arrives after its run is given up",
        "workers/headrace_workers/reaper.py",
        "await self._settle_suspended(await runs.suspend_orphans(self._pool))",
        "await self._settle_suspended({})",
        "test_claim_and_lease.py::test_an_intent_that_arrives_after_its_run_is_not_held_for_ever",
    ),
    Mutation(
        "holds that paid for no call are given back",
        "workers/headrace_workers/reaper.py",
        "leaked.append(Settlement(hold, ZERO))",
        "pass",
        "test_claim_and_lease.py::test_holds_without_a_call_are_given_back",
    ),
    Mutation(
        "a suspect runs in a process of its own",
        "shared/headrace_shared/store/runs.sql",
        "AND (j.crashes < 2 OR $4)",
        "AND ($4 OR NOT $4)",
        "test_claim_and_lease.py::test_after_two_crashes_only_a_process_of_its_own_gets_a_job",
    ),
    Mutation(
        "leases are spared right after the start of the store",
        "shared/headrace_shared/store/runs.sql",
        "AND moment.now > pg_postmaster_start_time() + make_interval(secs => $2)",
        "AND $2::float8 IS NOT NULL",
        "test_claim_and_lease.py::test_leases_are_spared_right_after_the_start_of_the_store",
    ),
    Mutation(
        "leases that could not be renewed are lost",
        "workers/headrace_workers/heartbeat.py",
        "if unrenewed >= job.lease:",
        "if unrenewed < timedelta(0):",
        "test_claim_and_lease.py::test_leases_that_cannot_be_renewed_in_time_are_lost",
    ),
    Mutation(
        "jobs that Redis does not know are found in Postgres",
        "workers/headrace_workers/feeder.py",
        "if present < self._window / 2",
        "if present < 0",
        "test_feeder.py::test_a_window_is_filled_in_order_and_no_further",
    ),
    Mutation(
        "counters of another server are not believed",
        "shared/headrace_shared/budgets.py",
        "if self._redis.run_id != run_id:",
        "if self._redis.run_id == '':",
        "test_budget_restart.py::test_an_old_snapshot_holds_nothing_in_the_very_call_that_finds_it",
    ),
    Mutation(
        "a budget that is full lets nothing through",
        "shared/headrace_shared/dispatch/lua/hold.lua",
        "if missing > 0 then",
        "if missing > c.limit then",
        "test_budget_holds.py::test_a_hold_is_over_all_scopes_or_none",
    ),
    Mutation(
        "what is to be cancelled is not put back",
        "shared/headrace_shared/store/runs.sql",
        "state = CASE WHEN (e.state = 'queued' AND j.cancel_requested) THEN 'cancelled' ELSE e.state END,",
        "state = e.state,",
        "test_cancel.py::test_a_run_that_would_be_put_back_is_cancelled_instead",
    ),
    Mutation(
        "a callback is written with its ending",
        "shared/headrace_shared/store/migrations/0001_initial.sql",
        "WHEN (NEW.webhook IS NOT NULL AND NEW.ended_at IS NOT NULL AND OLD.ended_at IS NULL)",
        "WHEN (NEW.webhook IS NOT NULL AND NEW.result_run IS NOT NULL AND OLD.ended_at IS NULL)",
        "test_claim_and_lease.py::test_a_crash_alone_that_was_seen_quarantines_and_calls_back",
    ),
    Mutation(
        "a key that is known gives its job",
        "shared/headrace_shared/store/jobs.sql",
        "WHERE i.key IS NULL OR k.job_id = i.id",
        "WHERE i.key IS NULL OR k.job_id IS NOT NULL",
        "test_enqueue.py::test_fifty_at_once_with_one_key_are_one_job",
    ),
)
