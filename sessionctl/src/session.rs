//! `get`, `set`, `incr`, `hold`, `rm`: one session, through the same calls that an application makes.

use std::io::{self, IsTerminal};
use std::time::Duration;

use serde_json::{Map, Value, json};
use session_core::Error;
use sessionkit::Session;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use crate::args::{GetArgs, HoldArgs, IncrArgs, RmArgs, SetArgs};
use crate::failure::Failure;
use crate::output::{Output, json_for_terminals};
use crate::store::{connect, session_id};
use crate::values::Any;

pub(crate) async fn get(args: GetArgs, out: &Output) -> Result<(), Failure> {
    let id = session_id(&args.id)?;
    let sessions = connect(&args.dsn).await?;
    let view = sessions.view(&id).await?;
    if !view.exists() {
        return Err(Failure::no("no such session"));
    }
    let value = match &args.key {
        Some(key) => view.get::<Any>(key)?.ok_or_else(|| Failure::no("the session has no such key"))?.0,
        None => {
            let mut all = Map::new();
            for key in view.keys() {
                if let Some(Any(value)) = view.get(key)? {
                    all.insert(key.to_owned(), value);
                }
            }
            Value::Object(all)
        }
    };
    // One line for programs; a person at a terminal gets it indented.
    let pretty = !out.is_json() && io::stdout().is_terminal();
    let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
    out.raw(&json_for_terminals(&text.map_err(io::Error::from)?))?;
    Ok(())
}

pub(crate) async fn set(args: SetArgs, out: &Output) -> Result<(), Failure> {
    let id = session_id(&args.id)?;
    // The position, not the text: a value may be a secret.
    let value: Value = serde_json::from_str(&args.value).map_err(|error| {
        Failure::usage(format!(
            "the value is not JSON from column {} on; a text needs its own quotes, '\"like this\"'",
            error.column()
        ))
    })?;
    let sessions = connect(&args.dsn).await?;
    let mut session = sessions.open_or_create(&id).await?;
    let created = session.is_new();
    session.insert(&args.key, &value)?;
    session.close().await?;
    sessions.shutdown().await;
    if out.is_json() {
        out.object(&json!({"key": args.key, "stored": true, "created": created}))?;
    } else {
        out.raw(if created { "stored in a new session" } else { "stored" })?;
    }
    Ok(())
}

pub(crate) async fn incr(args: IncrArgs, out: &Output) -> Result<(), Failure> {
    let id = session_id(&args.id)?;
    let sessions = connect(&args.dsn).await?;
    let bar = out.progress(args.times, "  {bar:32} {human_pos}/{human_len}  {per_sec}  {elapsed}");
    let mut last = 0;
    for time in 0..args.times {
        let mut session = sessions.open_or_create(&id).await.map_err(|error| after(time, &args, error))?;
        last = next(&session, &args.key)?;
        if !args.hold.is_zero() {
            tokio::time::sleep(args.hold).await;
        }
        session.insert(&args.key, &last)?;
        session.close().await.map_err(|error| after(time, &args, error))?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    sessions.shutdown().await;
    if out.is_json() {
        out.object(&json!({"key": args.key, "times": args.times, "value": last}))?;
    } else {
        out.raw(&last.to_string())?;
    }
    Ok(())
}

fn next(session: &Session, key: &str) -> Result<i64, Failure> {
    let value = session.get::<Any>(key)?.map_or(Value::from(0), |Any(value)| value);
    let number = value.as_i64().ok_or_else(|| Failure::no("the value is not a whole number"))?;
    number.checked_add(1).ok_or_else(|| Failure::no("the value is the largest number already"))
}

/// Says how far it got: what was counted before stays counted.
fn after(done: u64, args: &IncrArgs, error: Error) -> Failure {
    if done > 0 {
        eprintln!("sessionctl: counted {done} of {} times", args.times);
    }
    error.into()
}

pub(crate) async fn hold(args: HoldArgs, out: &Output) -> Result<(), Failure> {
    let id = session_id(&args.id)?;
    // Listened for before the lock is taken, so that no signal can come in between and kill a holder.
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::local("listen for signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::local("listen for signals"))?;
    let sessions = connect(&args.dsn).await?;
    let session = tokio::select! {
        session = sessions.open_or_create(&id) => session?,
        _ = terminate.recv() => return Err(Failure::no("told to end before it had the lock")),
        _ = interrupt.recv() => return Err(Failure::no("told to end before it had the lock")),
    };
    let since = Instant::now();
    let told = if out.is_json() { out.object(&json!({"held": true})) } else { out.raw("held") };
    if args.seconds.is_none() && !out.is_json() && io::stdin().is_terminal() && io::stderr().is_terminal() {
        eprintln!("(until Ctrl-C)");
    }
    let outcome = match told {
        Ok(()) => {
            let kept = keep(&session, args.seconds.map(Duration::from_secs));
            tokio::select! {
                outcome = kept => outcome,
                _ = terminate.recv() => Ok(()),
                _ = interrupt.recv() => Ok(()),
            }
        }
        Err(error) => Err(error.into()),
    };
    session.close().await?;
    sessions.shutdown().await;
    outcome?;
    if out.is_json() {
        let seconds = since.elapsed().as_secs_f64();
        out.object(&json!({"released": true, "seconds": (seconds * 1000.0).round() / 1000.0}))?;
    }
    Ok(())
}

/// Returns when the time is over, or when renewal has found that somebody else took over.
async fn keep(session: &Session, length: Option<Duration>) -> Result<(), Failure> {
    let end = length.and_then(|length| Instant::now().checked_add(length));
    loop {
        let tick = Instant::now() + Duration::from_millis(250);
        if end.is_some_and(|end| end <= tick) {
            tokio::time::sleep_until(end.expect("it was just compared")).await;
            return Ok(());
        }
        tokio::time::sleep_until(tick).await;
        if session.is_lost() {
            return Err(Failure::no("the lock was lost: somebody else took over"));
        }
    }
}

pub(crate) async fn rm(args: RmArgs, out: &Output) -> Result<(), Failure> {
    let id = session_id(&args.id)?;
    let sessions = connect(&args.dsn).await?;
    // The look is for the answer only; what is there by the time of the removal is removed in any case. Bytes that cannot be read
    // are something to remove, too.
    let existed = sessions.view(&id).await.map_or(true, |view| view.exists());
    sessions.destroy(&id).await?;
    sessions.shutdown().await;
    if out.is_json() {
        out.object(&json!({"removed": existed}))?;
    }
    match existed {
        true if out.is_json() => Ok(()),
        true => Ok(out.raw("removed")?),
        false => Err(Failure::no("no such session")),
    }
}
