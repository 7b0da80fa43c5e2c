//! Each case of the processes suite is failed by a store that breaks what the case is about, and passed by two honest ones:
//! one whose locks are the kernel's, one whose locks are leases.

use std::collections::HashSet;
use std::sync::Arc;

use conformance_tests::{cases, run_case};

mod naive;

use naive::{Naive, NaiveHarness};

mod honest {
    mod flock {
        use crate::naive::{Naive, NaiveHarness};
        conformance_tests::processes_suite!(NaiveHarness::new(Naive::Flock));
    }
    mod lease {
        use crate::naive::{Naive, NaiveHarness};
        conformance_tests::processes_suite!(NaiveHarness::new(Naive::Lease));
    }
}

macro_rules! liars {
    ($($case:ident: $flaw:ident;)+) => {
        const CAUGHT: &[(&str, Naive)] = &[$((stringify!($case), Naive::$flaw),)+];

        $(
            #[test]
            fn $case() {
                fails(stringify!($case), Naive::$flaw);
            }
        )+
    };
}

liars! {
    killed_holder_frees_its_session: ImmortalLock;
    stopped_holder_never_overwrites_who_took_over: LateWrites;
    closing_after_a_takeover_leaves_the_next_holder_alone: UnlocksAnybodys;
    waiter_that_gives_up_leaves_the_holder_alone: LosersUnlock;
    killed_waiters_do_not_disturb_the_queue: DeadTickets;
    increments_of_six_processes_are_all_kept: NoLock;
    appends_survive_the_killing_of_random_holders: NoLock;
    acknowledged_write_survives_the_death_of_its_writer: WriteBehind;
    kill_during_a_write_leaves_the_record_whole: TornWrites;
    views_beside_a_writing_process_never_go_back: StaleViews;
    what_one_process_wrote_the_next_one_reads: StaleViews;
    destroy_in_one_process_reaches_a_holder_in_another: Resurrects;
    absent_id_raced_by_two_processes_is_created_once: CreatesTwice;
    release_wakes_a_waiter_in_another_process: SleepyWaiters;
    no_process_starves: KeepsForItself;
    gc_spares_what_another_process_holds: GcForgetsHolders;
    gc_keeps_the_locks_of_another_process: GcSweepsLocks;
}

fn fails(name: &str, flaw: Naive) {
    let case = cases().iter().find(|case| case.suite() == "processes" && case.name() == name).expect("the case is listed");
    let harness = NaiveHarness::with_worker(flaw, "liar_worker");
    let runtime = runtime();
    let outcome = runtime.block_on(run_case(case, Arc::new(harness)));
    runtime.shutdown_background();
    println!("{flaw:?}: {}", outcome.detail);
    assert!(!outcome.passed, "{name} does not notice {flaw:?}");
}

fn runtime() -> tokio::runtime::Runtime {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime can be built")
}

#[test]
fn liar_worker() {
    let flaws: Vec<Naive> = CAUGHT.iter().map(|(_, flaw)| *flaw).collect();
    runtime().block_on(NaiveHarness::be_a_worker(&flaws));
}

#[test]
fn every_case_of_several_processes_has_its_liar() {
    let caught: HashSet<&str> = CAUGHT.iter().map(|(case, _)| *case).collect();
    let listed: HashSet<&str> = cases().iter().filter(|case| case.suite() == "processes").map(|case| case.name()).collect();
    assert_eq!(caught, listed);
}
