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


EACH_TIME = (
    Mutation(
        "only the run that owns the row ends it",
        "shared/headrace_shared/store/runs.sql",
        "WHERE j.id = e.job_id AND j.run = e.run AND j.state = moment.running",
        "WHERE j.id = e.job_id AND j.state = moment.running",
        "test_claim_and_lease.py::test_a_run_that_was_overtaken_ends_nothing",
    ),
    Mutation(
        "only the run that owns the row may call",
        "shared/headrace_shared/store/runs.sql",
        "JOIN headrace.jobs j ON j.id = i.job_id AND j.run = i.run AND j.state = fence.running",
        "JOIN headrace.jobs j ON j.id = i.job_id",
        "test_claim_and_lease.py::test_a_run_that_was_overtaken_may_make_no_call",
    ),
    Mutation(
        "no call goes out on a hold of an older epoch",
        "shared/headrace_shared/store/migrations/0003_budgets.sql",
        "RETURN (SELECT epoch = expected FROM headrace.money);",
        "RETURN true;",
        "test_budget_holds.py::test_no_call_goes_out_on_a_hold_of_an_older_epoch",
    ),
    Mutation(
        "the calls of a dead worker stand in suspense",
        "shared/headrace_shared/store/migrations/0003_budgets.sql",
        "state = 'suspense', suspense_nano = c.held_nano,",
        "state = 'failed', suspense_nano = 0,",
        "test_claim_and_lease.py::test_the_reaper_takes_back_what_a_dead_worker_held",
    ),
    Mutation(
        "holds that paid for no call are given back",
        "workers/headrace_workers/reaper.py",
        "leaked.append(Settlement(hold, ZERO))",
        "pass",
        "test_claim_and_lease.py::test_holds_without_a_call_are_given_back",
    ),
    Mutation(
        "jobs that Redis does not know are found in Postgres",
        "workers/headrace_workers/feeder.py",
        "if present < self._window / 2",
        "if present < 0",
        "test_feeder.py::test_a_window_is_filled_in_order_and_no_further",
    ),
    Mutation(
        "a budget that is full lets nothing through",
        "shared/headrace_shared/dispatch/lua/hold.lua",
        "if missing > 0 and c.policy ~= 'soft' then",
        "if missing > c.limit then",
        "test_budget_holds.py::test_a_hold_is_over_all_scopes_or_none",
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
    Mutation(
        "attempts of a run that died count",
        "shared/headrace_shared/store/lost.sql",
        "attempts = greatest(j.attempts, (",
        "attempts = least(j.attempts, (",
        "test_claim_and_lease.py::test_attempts_of_a_run_that_died_are_not_made_again",
    ),
    Mutation(
        "a server that was wiped is noticed",
        "shared/headrace_shared/dispatch/lua/claim.lua",
        "if not fed then ring(FEEDER_BELL) end",
        "",
        "test_feeder.py::test_a_wiped_server_rings_at_the_first_claim_and_once",
    ),
    Mutation(
        "a flight that nobody landed is landed",
        "workers/headrace_workers/reaper.py",
        "            self._landing.land_lost,\n",
        "",
        "test_sharing.py::test_what_nobody_landed_the_reaper_lands",
    ),
)
"""Those that every run of the suite tries."""

MORE = (
    Mutation(
        "an answer that came late is not paid for again",
        "workers/headrace_workers/steps/guard.py",
        "return run if run.job.answer is None else run.ended(Succeeded())",
        "return run if run else run.ended(Succeeded())",
        "test_claim_and_lease.py::test_an_answer_that_comes_after_the_reaper_is_booked_and_not_paid_for_again",
    ),
    Mutation(
        "an intent that arrives after its run is given up",
        "workers/headrace_workers/reaper.py",
        "await self._settle_suspended(await lost.suspend_orphans(self._pool))",
        "await self._settle_suspended({})",
        "test_claim_and_lease.py::test_an_intent_that_arrives_after_its_run_is_not_held_for_ever",
    ),
    Mutation(
        "a suspect runs in a process of its own",
        "shared/headrace_shared/store/claims.sql",
        "AND (j.crashes < 2 OR $4)",
        "AND ($4 OR NOT $4)",
        "test_claim_and_lease.py::test_after_two_crashes_only_a_process_of_its_own_gets_a_job",
    ),
    Mutation(
        "leases are spared right after the start of the store",
        "shared/headrace_shared/store/lost.sql",
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
        "counters of another server are not believed",
        "shared/headrace_shared/budgets.py",
        "if self._redis.run_id != run_id:",
        "if self._redis.run_id == '':",
        "test_budget_restart.py::test_an_old_snapshot_holds_nothing_in_the_very_call_that_finds_it",
    ),
    Mutation(
        "a soft budget refuses nothing",
        "shared/headrace_shared/dispatch/lua/hold.lua",
        "if missing > 0 and c.policy ~= 'soft' then",
        "if missing > 0 then",
        "test_budget_scopes.py::test_a_soft_budget_counts_and_refuses_nothing",
    ),
    Mutation(
        "a call that does not fit goes to a cheaper target",
        "workers/headrace_workers/steps/hold.py",
        "if held.policy is BudgetPolicy.DOWNGRADE:",
        "if held.policy is BudgetPolicy.SOFT:",
        "test_budget_policies.py::test_a_call_that_does_not_fit_goes_to_the_next_target_that_does",
    ),
    Mutation(
        "what may cost only so much counts its earlier runs",
        "shared/headrace_shared/store/claims.sql",
        "CASE c.state WHEN 'open' THEN c.held_nano ELSE 0 END",
        "0",
        "test_budget_scopes.py::test_a_later_run_knows_what_the_earlier_ones_cost_or_may_cost",
    ),
    Mutation(
        "a budget begins only beside counters of the epoch in force",
        "shared/headrace_shared/dispatch/lua/begin_budget.lua",
        "if not is_in_place(ARGV[1]) or",
        "if",
        "test_budget_scopes.py::test_a_budget_that_begins_while_a_rebuild_has_read_holds_as_well",
    ),
    Mutation(
        "a worker of the version before makes no call beside budgets that it does not know",
        "shared/headrace_shared/store/migrations/0003_budgets.sql",
        "WHERE window_kind = 'week' OR scope !~ '^(global$|tenant:)'",
        "WHERE false",
        "test_budget_scopes.py::test_the_version_before_makes_no_call_while_there_is_a_budget_that_it_does_not_know",
    ),
    Mutation(
        "a window ends where its zone says so",
        "shared/headrace_shared/store/migrations/0003_budgets.sql",
        "interval '30 minutes', interval '1 hour'",
        "interval '0'",
        "test_budget_windows.py::test_a_day_of_a_change_of_the_clocks_is_as_long_as_it_is",
    ),
    Mutation(
        "what is to be cancelled is not put back",
        "shared/headrace_shared/store/runs.sql",
        "state = CASE WHEN (e.state = 'queued' AND j.cancel_requested) THEN 'cancelled' ELSE e.state END,",
        "state = e.state,",
        "test_cancel.py::test_a_run_that_would_be_put_back_is_cancelled_instead",
    ),
    Mutation(
        "queued jobs whose time is over expire",
        "shared/headrace_shared/store/lost.sql",
        "AND least(start_by, end_by) <= moment.now",
        "AND least(start_by, end_by) > moment.now + interval '1 year'",
        "test_expiry.py::test_a_job_that_nobody_starts_within_its_time_to_live_expires",
    ),
    Mutation(
        "a late answer is found right before the call",
        "shared/headrace_shared/store/runs.sql",
        "  AND (i.run = 1 OR NOT EXISTS (",
        "  AND (i.run > 0 OR NOT EXISTS (",
        "test_late_answers.py::test_what_an_earlier_run_was_answered_is_not_asked_again",
    ),
    Mutation(
        "a run that lost its row keeps no checkpoint",
        "shared/headrace_shared/store/checkpoints.sql",
        "WHERE id = $1 AND run = $2 AND state = 'running' FOR SHARE",
        "WHERE id = $1 AND $2::int > 0 FOR SHARE",
        "test_handlers_replay.py::test_what_a_lost_run_writes_is_not_kept",
    ),
    Mutation(
        "nothing is sent while the lease is uncertain",
        "workers/headrace_workers/steps/lease.py",
        "if not self._leases.are_certain(run.job):",
        "if not self._leases:",
        "test_watchdog.py::test_nothing_is_sent_for_a_run_that_lost_its_row_while_the_loop_stood_still",
    ),
    Mutation(
        "a loop that stands still is reported",
        "workers/headrace_workers/watchdog.py",
        'self._report(f"the event loop has stood still for {time.monotonic() - asked:.1f} s")',
        "pass",
        "test_watchdog.py::test_a_stall_is_reported_once_with_its_code_and_no_values",
    ),
    Mutation(
        "the fleet does without Redis only when no live worker reaches it",
        "shared/headrace_shared/store/migrations/0002_recovery.sql",
        "coalesce(dispatch_until, 'infinity') > headrace.now()) THEN",
        "dispatch_until > 'infinity') THEN",
        "test_degraded.py::test_the_fleet_does_without_redis_only_when_no_live_worker_reaches_it",
    ),
    Mutation(
        "holds without Redis are taken one at a time",
        "shared/headrace_shared/store/migrations/0003_budgets.sql",
        "PERFORM pg_advisory_xact_lock(4851, key);",
        "NULL;",
        "test_degraded.py::test_processes_that_hold_at_once_are_never_over_and_never_refused_in_vain",
    ),
    Mutation(
        "holds without Redis count the calls that are open",
        "shared/headrace_shared/store/migrations/0003_budgets.sql",
        "held_nano AS amount FROM headrace.calls WHERE state = 'open'",
        "held_nano AS amount FROM headrace.calls WHERE false",
        "test_degraded.py::test_an_intent_takes_the_place_of_its_hold",
    ),
    Mutation(
        "damage in Redis is repaired",
        "shared/headrace_shared/dispatch/connection.py",
        "await self._repair(money=money)",
        "pass",
        "test_foreign_bytes.py::test_a_key_of_another_type_is_dropped_counted_and_logged_once",
    ),
    Mutation(
        "what an old snapshot brings back is dropped",
        "shared/headrace_shared/dispatch/lua/afresh.lua",
        "if name == Q or name == ACTIVE",
        "if false",
        "test_feeder.py::test_an_old_snapshot_leaves_no_window_full_of_ended_jobs",
    ),
    Mutation(
        "suspense that is settled becomes spend",
        "shared/headrace_shared/store/suspense.sql",
        "settled_nano = s.settled_nano + excluded.settled_nano,",
        "settled_nano = s.settled_nano,",
        "test_suspense.py::test_an_operator_decides_and_ledger_sums_and_counters_follow",
    ),
    Mutation(
        "a dead letter is retried once",
        "shared/headrace_shared/store/dead_letters.sql",
        "WHERE j.state IN ('failed', 'expired', 'cancelled') AND j.replaced_by IS NULL",
        "WHERE j.state IN ('failed', 'expired', 'cancelled')",
        "test_dead_letters.py::test_two_retries_at_once_make_one_job",
    ),
    Mutation(
        "a claim looks at the rows of pauses",
        "shared/headrace_shared/store/claims.sql",
        "  AND (m.paused IS NULL OR NOT m.paused && headrace.pausable_as(j.lane, j.route, j.tenant))\n",
        "",
        "test_pauses.py::test_a_pause_holds_from_its_commit_on_although_redis_was_never_told",
    ),
    Mutation(
        "the feeder puts pauses back before it fills",
        "workers/headrace_workers/feeder.py",
        "        await self._pauses.put_in_place()\n",
        "",
        "test_pauses.py::test_the_feeder_puts_pauses_back_into_a_wiped_redis_before_it_fills_it",
    ),
    Mutation(
        "no run begins before it can see what earlier ones opened of the job's own money",
        "shared/headrace_shared/store/runs.sql",
        "ORDER BY j.id FOR SHARE OF j",
        "ORDER BY j.id",
        "test_claim_and_lease.py::test_a_row_is_not_taken_from_an_intent_that_its_next_run_could_not_see",
    ),
    Mutation(
        "a probe that is not sent is given back",
        "workers/headrace_workers/steps/settle.py",
        "if run.target is not None and run.permit is not None and not run.sent:",
        "if run.target is None and run.permit is not None and not run.sent:",
        "test_leave.py::test_a_probe_that_is_not_sent_is_somebody_elses",
    ),
    Mutation(
        "a gate lets another job probe where the one that it let through came back without news",
        "shared/headrace_shared/dispatch/lua/finish.lua",
        "if any_probe and delay ~= -2 then end_turn_of_probe(id) end",
        "",
        "test_gates.py::test_a_job_that_comes_back_without_news_of_its_probe_lets_another_through",
    ),
    Mutation(
        "nothing is finished while leases are renewed",
        "shared/headrace_shared/dispatch/dispatch.py",
        "async with asyncio.timeout(_RENEWAL_PATIENCE), self._renewal:",
        "async with asyncio.timeout(_RENEWAL_PATIENCE):",
        "test_dispatch_claim.py::test_what_ends_during_a_renewal_is_not_leased_again",
    ),
    Mutation(
        "nothing is renewed that was written down as ended",
        "workers/headrace_workers/finisher.py",
        "self._forget([one.end for one in batch if one.end])",
        "pass",
        "test_claim_and_lease.py::test_a_run_that_ends_during_a_heartbeat_is_neither_renewed_nor_lost",
    ),
    Mutation(
        "what ended while a wiped Redis was filled is leased for nobody",
        "workers/headrace_workers/feeder.py",
        "[(entry, _NO_DELAY) for entry, _ in running if entry not in still]",
        "[]",
        "test_feeder.py::test_what_ends_while_a_wiped_dispatch_is_filled_is_leased_for_nobody",
    ),
    Mutation(
        "who is woken while his run is not finished yet is due when it is",
        "shared/headrace_shared/dispatch/lua/finish.lua",
        "if any_woken and delay ~= -2",
        "if false and delay ~= -2",
        "test_dispatch_claim.py::test_an_id_that_is_woken_is_due_whether_it_was_put_back_by_then_or_not",
    ),
    Mutation(
        "who takes a leader's place before he waits for it goes on at once",
        "shared/headrace_shared/store/runs.sql",
        "WHEN e.waiting_for = 'flight' AND j.follows IS NULL THEN moment.now",
        "",
        "test_sharing.py::test_a_follower_that_is_promoted_before_it_waits_goes_on_at_once",
    ),
    Mutation(
        "an id is woken although the worker that held it died",
        "shared/headrace_shared/dispatch/lua/push.lua",
        "        redis.call('ZADD', key, 'LT', now + WOKEN_ANYWAY_MS, id)\n",
        "",
        "test_dispatch_claim.py::test_an_id_is_woken_although_the_worker_that_held_it_died_before_it_said_so",
    ),
    Mutation(
        "a rebuild that another has overtaken changes nothing",
        "shared/headrace_shared/dispatch/lua/rebuild.lua",
        "if coming and read(whole_of, coming) > tonumber(ARGV[1]) then return tonumber(coming) end",
        "",
        "test_budget_holds.py::test_nothing_is_settled_between_two_rebuilds_that_overlap",
    ),
    Mutation(
        "nothing is settled under counters that are about to be replaced",
        "shared/headrace_shared/budgets.py",
        "        await self._redis.evaluate(_OUTDATE, (), [epoch])\n",
        "",
        "test_budget_holds.py::test_a_settlement_that_races_a_rebuild_counts_once_and_at_once",
    ),
)
