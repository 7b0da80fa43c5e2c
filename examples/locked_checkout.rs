//! Two requests pay for one cart. The lock makes the second wait; the fence refuses the one that slept through its lease.
//!
//! `cargo run --example locked_checkout`

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sessionkit::{ErrorKind, Result, SessionId, Sessions};

#[derive(Debug, Default, Deserialize, Serialize)]
struct Cart {
    items: Vec<String>,
    paid: u32,
}

async fn new_cart(sessions: &Sessions) -> Result<SessionId> {
    let mut session = sessions.create()?;
    session.insert("cart", &Cart { items: vec!["tea".into(), "a cup".into()], paid: 0 })?;
    Ok(session.close().await?.expect("a session with a value in it is stored"))
}

/// Pays unless somebody has: reads the cart, waits for the till, writes the cart. Says whether it paid.
async fn check_out(sessions: &Sessions, id: &SessionId, who: &str, till: impl AsyncFnOnce()) -> Result<bool> {
    let mut session = sessions.open(id).await?;
    let mut cart: Cart = session.get("cart")?.unwrap_or_default();
    if cart.paid > 0 {
        println!("{who}: it is paid already");
        session.close().await?;
        return Ok(false);
    }
    println!("{who}: paying for {}", cart.items.join(" and "));
    till().await;
    cart.paid += 1;
    session.insert("cart", &cart)?;
    session.close().await?;
    println!("{who}: paid");
    Ok(true)
}

async fn slow_till() {
    tokio::time::sleep(Duration::from_millis(50)).await;
}

#[tokio::main]
async fn main() -> Result<()> {
    let sessions = sessionkit::connect("memory://").await?;

    println!("Two at once: the second waits, and then sees what the first has done.");
    let id = new_cart(&sessions).await?;
    let (first, second) = tokio::try_join!(
        check_out(&sessions, &id, "  first", slow_till),
        check_out(&sessions, &id, "  second", slow_till),
    )?;
    assert_ne!(first, second, "exactly one of them pays");

    println!("One is stopped at the till for longer than its lease: the other takes over.");
    let id = new_cart(&sessions).await?;
    let (stopped, is_stopped) = mpsc::channel();
    let (wake, is_woken) = mpsc::channel::<()>();
    // A thread with a runtime of its own stands for a process: when it stops, so does the renewal of its leases.
    let process = thread::spawn({
        let (handler, id) = (sessions.handler().clone(), id.clone());
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime can be built").block_on(async {
                let sessions = Sessions::builder(handler).lease(Duration::from_millis(100)).build()?;
                let till = async || {
                    stopped.send(()).expect("somebody waits for this");
                    is_woken.recv().expect("somebody will say so");
                };
                check_out(&sessions, &id, "  the stopped one", till).await
            })
        }
    });
    is_stopped.recv().expect("it comes to the till");
    assert!(check_out(&sessions, &id, "  the other", slow_till).await?);
    wake.send(()).expect("it is still there");
    let refused = process.join().expect("it does not panic").expect_err("the other has paid");
    println!("  the stopped one: {refused}");
    assert_eq!(refused.kind(), ErrorKind::Fenced);

    let cart: Cart = sessions.view(&id).await?.get("cart")?.unwrap_or_default();
    assert_eq!(cart.paid, 1);
    println!("Paid once.");
    Ok(())
}
