//! Holds the cases and the liars to account: a case that no liar fails tests nothing, and a liar that fails no case shows a gap.
//!
//! The table below names for each case a liar that it is there for, and is tried by default. `CONFORMANCE_MATRIX=full` tries
//! every case on every liar and prints who was caught by whom. The cases of several processes have liars of their own, in
//! `process_liars.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use conformance_tests::liars::{Flaw, Liar};
use conformance_tests::{Case, Outcome, cases, run_case};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// How many pairs run at the same time: most of a case is waiting.
const AT_ONCE: usize = 48;

/// How often a liar may get away: a race is lost by chance.
const LUCK: u32 = 5;

macro_rules! caught_by {
    ($($suite:ident::$case:ident: $($flaw:ident),+;)+) => {
        const CAUGHT: &[(&str, &str, &[Flaw])] = &[$((stringify!($suite), stringify!($case), &[$(Flaw::$flaw),+]),)+];
    };
}

caught_by! {
    handler::absent_id_reads_none: ExistingLitters;
    handler::written_bytes_come_back_exactly: BytesAreCut;
    handler::an_empty_record_is_not_absent: EmptyIsAbsent;
    handler::a_large_record_comes_back_or_is_refused_whole: TooLargeDestroys;
    handler::a_later_write_replaces_all_of_the_earlier: BytesAreCut;
    handler::ids_differing_in_case_are_different: IdsFoldCase;
    handler::ids_of_every_shape_are_told_apart: IdsAreCut;
    handler::other_ids_are_left_alone: OneLockForAll;
    handler::other_namespaces_see_nothing: NamespacesAreOne;
    handler::a_write_is_seen_by_every_later_read: ReadsAreSharedByReaders;
    handler::a_write_keeps_the_lock: NoLock;
    handler::a_second_read_asks_the_store: ReadIsCached;
    handler::the_holder_reads_its_own_write: ReadIsCached;
    handler::a_session_can_be_written_again_and_again: OwnWriteIsForgotten;
    handler::second_opener_times_out_within_its_wait: WaitsTooLong, NeverWaits;
    handler::a_wait_of_zero_tries_once: WaitsTooLong;
    handler::the_same_caller_waits_too: LockIsReentrant;
    handler::waiter_is_in_soon_after_close: WakeIsLost;
    handler::waiter_is_in_soon_after_save: WakeIsLost;
    handler::waiter_reads_what_the_holder_wrote: ReadsBeforeLock;
    handler::waiters_all_get_in: ReadsBeforeLock;
    handler::different_ids_do_not_wait_for_each_other: OneLockForAll;
    handler::many_sessions_are_open_at_once: EightOpeningsAtATime;
    handler::close_twice_succeeds: SecondCloseFails;
    handler::close_leaves_the_record_alone: CloseClears;
    handler::closing_what_was_absent_leaves_nothing: ExistingLitters;
    handler::read_only_never_waits: ReaderWaits;
    handler::read_only_is_not_waited_for: ReaderHolds;
    handler::read_only_cannot_change_anything: ReadOnlyWrites, ReadOnlyDestroys;
    handler::destroy_access_allows_nothing_else: DestroyAccessReads, DestroyAccessWrites;
    handler::existing_absent_open_takes_no_lock: ExistingLocksAbsent;
    handler::existing_absent_open_never_waits: ExistingWaitsForAbsent;
    handler::existing_absent_open_leaves_nothing: ExistingLitters;
    handler::existing_absent_open_cannot_create: ExistingCreates;
    handler::an_absent_id_can_be_locked_and_created: NoLock;
    handler::fresh_open_takes_no_lock: FreshLocksAtOpen;
    handler::fresh_create_conflicts_with_a_live_id: FreshReplaces, FreshConflictIsGone;
    handler::fresh_create_after_destroy_is_a_conflict: DestroyLeavesNoTrace;
    handler::first_write_of_a_fresh_id_takes_the_lock: FreshTakesNoLock;
    handler::fresh_open_without_a_write_leaves_nothing: CloseCreates;
    handler::destroyed_is_absent_to_everybody: ReadIsCached;
    handler::destroy_returns_what_it_removed: DestroyReturnsNothing;
    handler::destroying_the_absent_succeeds: DestroyOfAbsentFails;
    handler::destroy_never_waits: DestroyWaits, DestroyIsFenced;
    handler::a_destroyed_session_can_be_created_again: SaveReleasesFirst;
    handler::holder_destroys_and_the_next_gets_in: DestroyKeepsLock;
    handler::a_refused_write_gives_the_lock_back: RefusalKeepsLock;
    handler::touch_leaves_the_bytes_alone: TouchPutsBackOldBytes;
    handler::touch_of_the_absent_is_gone: TouchCreates;
    handler::save_writes_and_closes: SaveKeepsLock;
    handler::save_touches_and_closes: SaveForgetsTouch;
    handler::save_destroys_and_closes: DestroyKeepsLock, SaveForgetsDestroy;
    handler::save_of_nothing_closes: SaveKeepsLock;
    handler::a_refused_save_closes: RefusalIsSwallowed;

    lock::one_at_a_time: NoLock;
    lock::a_taken_lock_times_out_within_the_wait: WaitsTooLong;
    lock::without_a_wait_it_is_tried_once: WaitsTooLong;
    lock::whoever_has_it_waits_too: LockIsReentrant;
    lock::different_ids_never_contend: OneLockForAll;
    lock::a_release_lets_the_next_in_soon: WakeIsLost;
    lock::a_waiter_who_gave_up_is_not_waited_for: DeadWaiterBlocksQueue;
    lock::a_dropped_acquire_is_forgotten: DroppedOpenKeepsLock;
    lock::a_lease_knows_its_id_and_length: LeaseTellsAnotherLength;
    lock::a_lease_lasts_its_length: LeaseEndsEarly;
    lock::a_lease_ends_by_itself: LockNeverEnds;
    lock::a_takeover_is_not_called_clean: TakeoverIsCalledClean;
    lock::releasing_twice_succeeds: ReleaseFreesAnyLock;
    lock::a_release_after_loss_touches_nobody: ReleaseFreesAnyLock;
    lock::abandoning_never_blocks: DroppedOpeningKeepsLock;
    lock::abandoning_after_loss_touches_nobody: DropFreesAnyLock;
    lock::renewal_extends: RenewalDoesNothing;
    lock::renewal_is_for_the_whole_length: RenewalIgnoresLength;
    lock::renewal_after_takeover_is_fenced: RenewalOfLostSucceeds;
    lock::renewals_are_answered_in_order: RenewalAnswersReversed;
    lock::renewing_nothing_answers_nothing: RenewalAnswersOne;
    lock::a_released_lease_is_not_renewed_over_the_next: RenewalTakesBack;
    lock::tokens_are_never_used_twice: TokenIsTheProcess;

    fence::repeat_of_a_write_is_already_applied: RepeatIsRefused;
    fence::repeat_of_a_create_is_already_applied: RepeatIsRefused;
    fence::repeat_of_a_save_is_already_applied: SaveKeepsLock;
    fence::repeat_after_somebody_else_wrote_is_refused: RepeatIsAppliedAgain;
    fence::expired_lease_that_nobody_took_still_writes: StrictByStealth, StrictIsIgnored;
    fence::late_write_after_the_successor_wrote_is_fenced: NoFence;
    fence::late_write_before_the_successor_writes_is_fenced: VersionIsEnough;
    fence::second_save_of_one_open_after_takeover_is_fenced: NoFence;
    fence::second_save_after_an_idle_takeover_is_not_swallowed: FencePerOpening;
    fence::late_touch_after_takeover_is_fenced: TouchIsUnfenced;
    fence::late_save_leaves_the_successor_its_lock: CloseFreesAnyLock;
    fence::late_close_leaves_the_successor_its_lock: CloseFreesAnyLock, CloseAfterLossFails;
    fence::late_drop_leaves_the_successor_its_lock: DropFreesAnyLock;
    fence::a_refused_write_changes_nothing: WriteKeepsDeadline;
    fence::foreign_destroy_then_holder_saves_is_gone: OwnerIsEnough;
    fence::foreign_destroy_then_holder_writes_twice_is_gone: OwnerIsEnough;
    fence::destroyed_and_created_again_is_not_the_same: VersionIsACounter;
    fence::absent_created_destroyed_is_not_absent: OwnerIsEnough;
    fence::absent_created_by_the_successor_is_refused: UnlockLeavesHolderIn;
    fence::renewal_after_takeover_is_fenced: RenewalTakesBack;
    fence::random_histories_lose_nothing: NoFence;

    expiry::a_record_lives_at_least_its_ttl: DiesEarly;
    expiry::expired_is_absent_before_gc: ExpiredIsServed;
    expiry::expired_is_not_brought_back_by_reading: ReadIsCached;
    expiry::a_read_tells_what_is_left: ReadReportsWholeLife;
    expiry::reading_does_not_prolong: ReadProlongs;
    expiry::a_write_starts_a_new_life: WriteKeepsDeadline;
    expiry::a_touch_moves_the_deadline: TouchDoesNothing;
    expiry::an_expired_session_is_not_touched_back_to_life: TouchRevives;
    expiry::stopped_past_the_deadline_is_gone: WriteRevives;
    expiry::an_expired_id_can_be_created_again: WriteRevives;
    expiry::destroying_the_expired_finds_nothing: DestroyReturnsTheExpired, LivesForEver;
    expiry::an_exclusive_open_prolongs_to_two_leases: ReadReportsWholeLife, OpenDoesNotProlong;
    expiry::hold_longer_than_idle_time_saves: RenewalDoesNotProlong;
    expiry::renewal_revives_nothing: RenewalRevives;
    expiry::an_ended_lease_lets_the_next_in: LockNeverEnds;
    expiry::a_lease_lasts_its_length: LeaseEndsEarly;
    expiry::gc_spares_the_living: GcTakesTheLiving;
    expiry::gc_spares_what_was_prolonged: GcTakesRenewed;
    expiry::gc_spares_what_lives_again: GcTrustsEarlierFinds;
    expiry::gc_spares_the_held: GcTakesHeld;
    expiry::gc_counts_each_record_once: GcCountsTwice, GcCountsDestroyed;
    expiry::gc_respects_its_limit: GcIgnoresLimit;
    expiry::gc_never_waits: GcWaits, GcRunsAlone;
    expiry::gc_is_never_needed: ExpiredIsServed;

    optimistic::optimistic_write_is_applied_if_nothing_happened: SaveWritesOldBytes;
    optimistic::optimistic_open_takes_no_lock: OptimismWaits;
    optimistic::second_optimistic_writer_conflicts: OptimismIgnoresVersion;
    optimistic::optimistic_write_after_a_holder_wrote_conflicts: OptimismIgnoresVersion;
    optimistic::optimistic_writer_may_go_on: OptimismIgnoresVersion;
    optimistic::optimistic_write_yields_to_a_holder: OptimismIgnoresHolder;
    optimistic::optimistic_write_beside_an_ended_lease_loses_nothing: OwnerIsEnough;
    optimistic::optimistic_version_survives_recreate: VersionIsACounter;
    optimistic::optimistic_write_to_the_destroyed_is_gone: NoFence;
    optimistic::optimistic_write_to_the_expired_is_gone: WriteRevives;
    optimistic::a_touch_is_no_write: TouchIsAWrite;
    optimistic::optimistic_touch_yields_too: TouchIsUnfenced;
    optimistic::optimistic_create_is_won_by_the_first: OptimismIgnoresHolder;
    optimistic::optimistic_create_after_create_and_destroy_is_refused: DestroyLeavesNoTrace;
    optimistic::optimistic_existing_absent_cannot_create: ExistingCreates;
    optimistic::optimistic_repeat_is_already_applied: RepeatIsRefused;
    optimistic::optimistic_increments_are_all_counted: NoFence, ChecksThenStores;
    optimistic::optimistic_beside_exclusive_increments: OptimismIgnoresHolder;

    race::hundred_increments: ReadsBeforeLock;
    race::appends_are_all_there: NoLock;
    race::holders_exclude_each_other: NoLock;
    race::stalled_holders_lose_nothing: NoFence;
    race::two_creators_one_wins: FreshChecksThenCreates;
    race::a_fresh_create_beside_locked_ones_loses_nothing: FreshChecksThenCreates;
    race::absent_id_is_created_once: ReadsBeforeLock;
    race::readers_see_whole_records: TearsWrites;
    race::readers_never_go_back: ReaderGoesBack;
    race::readers_beside_touches_see_the_record: TouchTakesTwoSteps;
    race::destroy_while_three_wait_for_anything: DestroyReleasesFirst;
    race::destroy_while_three_wait_for_the_session: DestroyReleasesFirst;
    race::foreign_destroy_while_one_holds_and_three_wait: NoFence;
    race::a_logout_wins_every_race: NoFence;
    race::destroy_is_told_to_one: DestroyOfAbsentFails;
    race::gc_destroy_create_race_keeps_the_live_one: GcTakesReplaced;
    race::gc_beside_prolonging_keeps_the_prolonged: GcTakesRenewed;

    cancel::dropped_opening_frees_its_lock_by_the_end_of_its_lease: DroppedOpeningKeepsLock;
    cancel::dropped_creator_frees_its_lock_by_the_end_of_its_lease: DroppedOpeningKeepsLock;
    cancel::dropped_opening_writes_nothing: DroppedOpeningKeepsLock;
    cancel::dropping_needs_no_runtime_and_never_blocks: DroppedOpeningKeepsLock;
    cancel::dropped_open_frees_its_lock_by_the_end_of_its_lease: DroppedOpeningKeepsLock;
    cancel::dropped_waiters_do_not_disturb_the_queue: DroppedOpenKeepsLock;
    cancel::waiters_who_gave_up_do_not_disturb_the_queue: DeadWaiterBlocksQueue;
    cancel::dropped_write_is_whole_or_nothing: TearsWrites;
    cancel::dropped_save_is_whole_or_nothing_and_frees_its_lock: TearsWrites;
    cancel::dropped_destroy_removed_or_not: DestroyOfAbsentFails;
    cancel::cancel_storm: DroppedOpenKeepsLock;

    hostile::errors_show_no_secrets: ErrorShowsId;
    hostile::debug_shows_no_secrets: DebugShowsPayload, DebugShowsId;
    hostile::bytes_of_any_protocol_come_back: BytesBecomeText;
    hostile::unknown_ids_leave_nothing: ExistingLitters;
    hostile::an_oversized_write_leaves_the_old_record: TooLargeDestroys;
    hostile::extreme_lives_and_waits_are_kept: WaitsTooLong;
    hostile::a_flood_of_ids_does_not_mix: IdsCollide;
    hostile::ids_that_look_like_paths_are_ids: ListShowsTheDead;

    admin::list_shows_the_living_only: ListShowsLocks;
    admin::list_reaches_everything_in_small_pages: ListForgetsRest;
    admin::locks_shows_who_holds: LocksShowTheEnded, LocksAreHidden;
    admin::unlock_lets_the_next_in_and_fences_the_holder: UnlockDoesNothing;
    admin::unlock_of_the_free_says_no: UnlockAlwaysSaysYes;

    sessions::values_come_back_in_another_process: BytesEndAtNul;
    sessions::an_unknown_id_is_never_adopted: ExistingLitters;
    sessions::a_hundred_overlapping_updates_count_a_hundred: SaveWritesOldBytes;
    sessions::updates_run_one_after_the_other: NoLock;
    sessions::tasks_of_one_process_are_served_in_order: QueueHoldsNobody;
    sessions::a_full_queue_turns_away: QueueHasNoEnd;
    sessions::a_failed_update_writes_nothing: CloseClears;
    sessions::merges_of_different_keys_are_both_kept: OptimismIgnoresVersion;
    sessions::merges_of_the_same_key_conflict_by_name: OptimismIgnoresVersion;
    sessions::two_merges_of_one_session_at_once: OptimismIgnoresVersion;
    sessions::a_merge_beside_a_holder_loses_nothing: OptimismIgnoresHolder;
    sessions::a_merge_of_the_destroyed_is_gone: NoFence;
    sessions::a_view_never_waits: ReaderWaits;
    sessions::a_released_session_is_free_and_reopens_fresh: SaveWritesOldBytes;
    sessions::a_dropped_session_is_free_and_unchanged: CloseClears;
    sessions::an_unchanged_session_is_not_rewritten: CloseClears;
    sessions::an_unchanged_session_lives_on: TouchDoesNothing;
    sessions::a_long_hold_keeps_its_session: LeaseEndsEarly;
    sessions::an_absolute_end_is_the_end: NoAbsoluteEnd;
    sessions::a_logout_elsewhere_wins: NoFence;
    sessions::three_who_wait_for_a_destroyed_session_get_new_ones: ReadsBeforeLock;
    sessions::random_requests_bring_nothing_back: NoFence;
    sessions::parallel_requests_across_a_rotate_lose_nothing: SaveWritesOldBytes;
    sessions::logout_with_the_old_id_during_a_rotate: NoFence;
    sessions::a_rotate_in_the_middle_of_a_logout_saves_nobody: DestroyReturnsNothing;
    sessions::a_logout_with_the_old_id_after_a_rotate: SaveWritesOldBytes;
    sessions::after_an_elevate_the_old_id_sees_nothing: SaveWritesOldBytes;
    sessions::a_dropped_save_goes_on: SaveWritesOldBytes;
    sessions::a_lost_reply_counts_once: RepeatIsRefused;
    sessions::a_lost_reply_of_the_first_save_stores_once: RepeatIsRefused;
    sessions::a_lost_reply_before_another_write_is_unknown: RepeatIsAppliedAgain;
    sessions::a_lost_reply_before_a_logout_brings_nothing_back: NoFence;
    sessions::a_save_that_was_not_sent_may_be_repeated: SaveWritesOldBytes;

    trips::open_is_one_flight: OpenLocksThenReads;
    trips::save_and_close_is_one_flight: SaveWritesThenUnlocks;
    trips::a_view_is_one_flight: ViewAsksTwice;
    trips::a_fresh_id_is_one_flight: FreshAsksAtOpen;
    trips::a_logout_is_one_flight: DestroyLooksFirst;
}

#[test]
fn every_case_is_there_for_a_liar_and_every_liar_for_a_case() {
    let listed: Vec<_> = CAUGHT.iter().map(|(suite, case, _)| (*suite, *case)).collect();
    let there: Vec<_> = judged().map(|case| (case.suite(), case.name())).collect();
    assert_eq!(there, listed, "the cases of the registry and of the table");
    let caught: BTreeSet<_> = CAUGHT.iter().flat_map(|(_, _, flaws)| flaws.iter().copied()).collect();
    let idle: Vec<_> = Flaw::ALL.iter().filter(|flaw| !caught.contains(flaw)).collect();
    assert!(idle.is_empty(), "liars that no case is there for: {idle:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_liar_is_caught_and_the_honest_store_is_not() {
    let full = std::env::var("CONFORMANCE_MATRIX").is_ok_and(|matrix| matrix == "full");
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut pairs = JoinSet::new();
    for (case, (_, _, flaws)) in judged().zip(CAUGHT) {
        let flaws = if full { Flaw::ALL } else { flaws };
        for flaw in [Flaw::None].into_iter().chain(flaws.iter().copied()) {
            let places = places.clone();
            let tries = if expected(case, flaw) { LUCK } else { 1 };
            pairs.spawn(async move {
                let _place = places.acquire_owned().await;
                let mut outcome = run_case(case, Arc::new(Liar::new(flaw))).await;
                for _ in 1..tries {
                    if outcome.passed {
                        outcome = run_case(case, Arc::new(Liar::new(flaw))).await;
                    }
                }
                (case, flaw, outcome)
            });
        }
    }
    let started = Instant::now();
    let tried = pairs.len();
    let mut catchers: BTreeMap<String, Vec<Flaw>> = BTreeMap::new();
    let mut caught: BTreeMap<Flaw, Vec<String>> = BTreeMap::new();
    let mut wrong = Vec::new();
    while let Some(pair) = pairs.join_next().await {
        let (case, flaw, outcome): (&Case, Flaw, Outcome) = pair.expect("a pair is run to its end");
        let name = format!("{case:?}");
        if flaw == Flaw::None && !outcome.passed {
            wrong.push(format!("{name} fails the honest store: {}", outcome.detail));
        }
        if expected(case, flaw) && outcome.passed {
            wrong.push(format!("{name} does not notice {flaw:?} (CONFORMANCE_SEED={})", outcome.seed));
        }
        if flaw != Flaw::None && !outcome.passed {
            catchers.entry(name.clone()).or_default().push(flaw);
            caught.entry(flaw).or_default().push(name);
        }
    }
    for (case, liars) in &catchers {
        println!("{case} catches {liars:?}");
    }
    for (liar, cases) in &caught {
        println!("{liar:?} is caught by {}", cases.join(", "));
    }
    println!("{tried} pairs of {} cases and {} liars in {:?}", CAUGHT.len(), Flaw::ALL.len(), started.elapsed());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn expected(case: &Case, flaw: Flaw) -> bool {
    CAUGHT.iter().any(|(suite, name, flaws)| (*suite, *name) == (case.suite(), case.name()) && flaws.contains(&flaw))
}

/// The cases that need one process only, in the order of the registry.
fn judged() -> impl Iterator<Item = &'static Case> {
    cases().iter().filter(|case| case.suite() != "processes")
}
