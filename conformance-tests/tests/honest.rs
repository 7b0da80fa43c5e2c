//! Runs every suite over the honest store: what the liars are measured against has to keep every promise itself.

use conformance_tests::liars::{Flaw, Liar};

conformance_tests::handler_suite!(Liar::new(Flaw::None));
conformance_tests::lock_suite!(Liar::new(Flaw::None));
conformance_tests::fence_suite!(Liar::new(Flaw::None));
conformance_tests::expiry_suite!(Liar::new(Flaw::None));
conformance_tests::optimistic_suite!(Liar::new(Flaw::None));
conformance_tests::race_suite!(Liar::new(Flaw::None));
conformance_tests::cancel_suite!(Liar::new(Flaw::None));
conformance_tests::hostile_suite!(Liar::new(Flaw::None));
conformance_tests::admin_suite!(Liar::new(Flaw::None));
conformance_tests::sessions_suite!(Liar::new(Flaw::None));
conformance_tests::trips_suite!(Liar::new(Flaw::None));

mod strict {
    use super::{Flaw, Liar};

    conformance_tests::fence_suite!(Liar::new(Flaw::None).strict());
}

#[tokio::test]
async fn a_store_that_has_everything_is_held_to_everything_but_processes() {
    let claims = conformance_tests::claims(&Liar::new(Flaw::None)).await;
    let claims = claims.unwrap_or_else(|error| panic!("the honest store was refused: {error:?}"));
    let all =
        ["handler", "lock", "fence", "expiry", "optimistic", "race", "cancel", "hostile", "admin", "sessions", "trips"];
    assert_eq!(claims, all);
}
