//! Hand-over: how long after the holder's close the next in line has the session.

use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use session_core::SessionId;
use sessionkit::Sessions;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines, Stdin};
use tokio::process::Command;

use crate::args::Part;
use crate::bench::Round;
use crate::failure::Failure;
use crate::output::Output;
use crate::store::{connect, session_id};
use crate::worker;

/// How long a waiter is given to get from "about to open" to where it sleeps.
const SETTLE: Duration = Duration::from_millis(5);

/// Times hand-overs from this process to a child that waits.
pub(crate) async fn between_processes(dsn: &str, times: u32) -> Result<Round, Failure> {
    let sessions = connect(dsn).await?;
    let id = stored(&sessions).await?;
    let mut child = Command::from(worker::command(Part::Handover)?)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(Failure::local("start a waiter"))?;
    let mut to_child = child.stdin.take().expect("it is piped");
    let mut from_child = BufReader::new(child.stdout.take().expect("it is piped")).lines();
    // On a pipe and not as arguments: what holds an id or a password is not for the list of processes.
    let tell = |error| Failure::local("talk to the waiter")(error);
    let store = serde_json::to_string(&(dsn, id.as_str())).expect("two texts are always JSON");
    to_child.write_all(format!("{store}\n").as_bytes()).await.map_err(tell)?;
    let (began, mut waits) = (Instant::now(), Vec::new());
    for _ in 0..times {
        let session = sessions.open(&id).await?;
        to_child.write_all(b"open\n").await.map_err(tell)?;
        let _about_to_open = next_line(&mut from_child).await?;
        tokio::time::sleep(SETTLE).await;
        let closed = monotonic();
        session.close().await?;
        let opened = next_line(&mut from_child).await?;
        let opened: u64 = opened.parse().map_err(|_| Failure::no("the waiter did not say when it had the session"))?;
        waits.push(u32::try_from(opened.saturating_sub(closed)).unwrap_or(u32::MAX));
        let _closed = next_line(&mut from_child).await?;
    }
    drop(to_child);
    child.wait().await.map_err(tell)?;
    Ok(Round { ran: (began, Instant::now()), waits })
}

async fn next_line<R: tokio::io::AsyncRead + Unpin>(lines: &mut Lines<BufReader<R>>) -> Result<String, Failure> {
    let line = lines.next_line().await.map_err(Failure::local("listen to the waiter"))?;
    line.ok_or_else(|| Failure::no("the waiter ended early"))
}

/// The child of [`between_processes`].
pub(crate) async fn wait_for_handovers(mut lines: Lines<BufReader<Stdin>>) -> Result<(), Failure> {
    let mut said = async || lines.next_line().await.map_err(Failure::local("listen to the bench"));
    let Some(store) = said().await? else { return Ok(()) };
    let (dsn, id): (String, String) =
        serde_json::from_str(&store).map_err(|_| Failure::usage("__worker is for sessionctl itself"))?;
    let (sessions, id, out) = (connect(&dsn).await?, session_id(&id)?, Output::new(true));
    while said().await?.is_some() {
        out.raw("about to open")?;
        let session = sessions.open(&id).await?;
        let opened = monotonic();
        out.raw(&opened.to_string())?;
        session.close().await?;
        out.raw("closed")?;
    }
    Ok(())
}

/// Times hand-overs between two tasks.
pub(crate) async fn between_tasks(sessions: &Sessions, times: u32) -> Result<Round, Failure> {
    let id = stored(sessions).await?;
    let (began, mut waits) = (Instant::now(), Vec::new());
    for _ in 0..times {
        let session = sessions.open(&id).await?;
        let waiter = tokio::spawn({
            let (sessions, id) = (sessions.clone(), id.clone());
            async move {
                let session = sessions.open(&id).await?;
                let opened = Instant::now();
                session.close().await?;
                Ok::<_, session_core::Error>(opened)
            }
        });
        tokio::time::sleep(SETTLE).await;
        let closed = Instant::now();
        session.close().await?;
        let opened = waiter.await.expect("the waiter does not panic")?;
        waits.push(Round::nanos(opened.saturating_duration_since(closed)));
    }
    Ok(Round { ran: (began, Instant::now()), waits })
}

async fn stored(sessions: &Sessions) -> Result<SessionId, Failure> {
    let mut session = sessions.create()?;
    session.insert("n", &0)?;
    let id = session.id().clone();
    session.close().await?;
    Ok(id)
}

/// Nanoseconds on the clock that all processes of a machine share.
fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock");
    u64::try_from(Duration::from(now).as_nanos()).unwrap_or(u64::MAX)
}
