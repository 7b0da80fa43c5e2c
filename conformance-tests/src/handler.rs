//! The suite of the callbacks: what `open`, `read`, `write`, `destroy`, `close` and `gc` owe to one caller after the other.

use session_core::{Expect, OpenRequest};

use crate::case::suite;
use crate::harness::Env;
use crate::steps::{look, new_id, open};

suite! { $
    /// Claims that the callbacks do what [`SessionHandler`](session_core::SessionHandler) says; takes a harness.
    handler as handler_suite {
        absent_id_reads_none: "An id that nobody wrote is absent, however it is opened.";
    }
}

async fn absent_id_reads_none(env: Env) {
    let handler = env.handler().await;
    let requests = [
        env.patient(),
        env.patient().expecting(Expect::Any),
        env.patient().expecting(Expect::Fresh),
        OpenRequest::read_only(),
        OpenRequest::read_only().expecting(Expect::Any),
    ];
    for request in requests {
        let id = new_id();
        let mut opened = open(&*handler, &id, request).await;
        for time in ["first", "second"] {
            let read = opened.read().await;
            assert!(matches!(read, Ok(None)), "the {time} read after {request:?} said {read:?}");
        }
        opened.close().await.unwrap_or_else(|error| panic!("close after {request:?} failed: {error:?}"));
        assert_eq!(look(&*handler, &id).await, None, "reading left something behind");
    }
}
