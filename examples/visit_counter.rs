//! The smallest use: a counter in a session, without a server.
//!
//! `cargo run --example visit_counter`

use sessionkit::{ErrorKind, Result, Session};

#[tokio::main]
async fn main() -> Result<()> {
    // The same program runs on files with `file:///tmp/visits`.
    let sessions = sessionkit::connect("memory://").await?;

    let mut session = sessions.create()?;
    session.insert("visits", &1)?;
    let id = session.close().await?.expect("a session with a value in it is stored");

    // Fifty requests of one visitor at once. Not one of them is lost.
    let visit = async |session: &mut Session| session.update_key("visits", |n: Option<u32>| n.unwrap_or(0) + 1);
    let mut requests = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let (sessions, id) = (sessions.clone(), id.clone());
        requests.spawn(async move { sessions.update(&id, visit).await });
    }
    while let Some(request) = requests.join_next().await {
        request.expect("no request panics")?;
    }

    // A look takes no lock and waits for nobody.
    let visits: Option<u32> = sessions.view(&id).await?.get("visits")?;
    println!("visits: {}", visits.unwrap_or(0));
    assert_eq!(visits, Some(51));

    // A logout wins over a request that is still running.
    let mut late = sessions.open(&id).await?;
    sessions.destroy(&id).await?;
    late.insert("visits", &0)?;
    let refused = late.close().await.expect_err("the session is gone");
    println!("a save after the logout: {refused}");
    assert_eq!(refused.kind(), ErrorKind::Gone);
    Ok(())
}
