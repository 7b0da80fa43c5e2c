//! `lab`: the page that shows the lost update, and shows it gone, on a real store.
//!
//! Reading order: [`plan`] (what is asked for), [`run`] (what the requests do), [`lane`] (what is measured of each), [`story`] (what
//! it means), [`jobs`] (one at a time), [`locks`] (who holds what), [`backends`] (the stores), [`guard`] (who may ask), [`server`] (the
//! addresses), and `page/`, which draws.

mod backends;
mod guard;
mod jobs;
mod lane;
mod locks;
mod plan;
mod run;
mod server;
mod story;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use session_core::ErrorKind;
use tempfile::TempDir;
use tokio::net::{TcpListener, lookup_host};
use tokio::signal::unix::{SignalKind, signal};

use self::backends::Backend;
use self::guard::{Guard, authority};
use self::jobs::Jobs;
use self::locks::Locks;
use self::server::{Lab, routes};
use crate::args::LabArgs;
use crate::failure::{Failure, chain};
use crate::output::{Output, Style, escape};

pub(crate) async fn lab(args: LabArgs, out: &Output) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::local("listen for signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::local("listen for signals"))?;
    // Declared before everything that works in it, so that it is removed after all of that has ended.
    let directory = match args.dsns.is_empty() {
        true => Some(temporary()?),
        false => None,
    };
    let backends = match &directory {
        Some(directory) => Backend::of_our_own(directory.path())?,
        None => Backend::named(&args.dsns)?,
    };
    those_that_answer(&backends).await?;
    let listener = listen(&args.host, args.port).await?;
    let address = listener.local_addr().map_err(Failure::local("listen"))?;
    let lab = Arc::new(Lab {
        backends,
        jobs: Jobs::new(),
        locks: Arc::new(Locks::new()?),
        guard: Arc::new(Guard::new(address, &args.host)?),
        address: address.to_string(),
    });
    welcome(&lab, address, out)?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serve = axum::serve(listener, routes(Arc::clone(&lab))).with_graceful_shutdown(async {
        let _ = stopped.await;
    });
    let mut serve = std::pin::pin!(serve.into_future());
    tokio::select! {
        ended = &mut serve => return ended.map_err(Failure::local("serve")),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _ = stop.send(());
    lab.jobs.stop().await;
    lab.locks.stop().await;
    // A browser may keep a connection for as long as it likes.
    let _ = tokio::time::timeout(Duration::from_millis(200), serve).await;
    Ok(())
}

fn temporary() -> Result<TempDir, Failure> {
    tempfile::Builder::new().prefix("sessionctl-lab-").tempdir().map_err(Failure::local("make a temporary directory"))
}

/// Asks every store; says which do not answer, and fails if none does.
async fn those_that_answer(backends: &[Backend]) -> Result<(), Failure> {
    let mut refusals = Vec::new();
    for backend in backends {
        if let Err(error) = backend.sessions().await {
            // A mistake in a DSN is not mended by waiting.
            if error.kind() == ErrorKind::Config && backends.len() == 1 || error.kind() == ErrorKind::Unsupported {
                return Err(error.into());
            }
            refusals.push((backend, error));
        }
    }
    if refusals.len() == backends.len()
        && let Some((_, error)) = refusals.pop()
    {
        return Err(error.into());
    }
    for (backend, error) in refusals {
        eprintln!("sessionctl: lab: goes on without {}: {}", backend.label(), chain(&error));
    }
    Ok(())
}

async fn listen(host: &str, port: u16) -> Result<TcpListener, Failure> {
    let place = format!("listen at port {port}");
    let hint = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::AddrInUse => Failure::usage(format!("port {port} is taken; --port 0 takes a free one")),
        _ => Failure::Local(place.clone(), error),
    };
    let addresses: Vec<SocketAddr> = lookup_host((host, port)).await.map_err(hint)?.collect();
    TcpListener::bind(addresses.as_slice()).await.map_err(hint)
}

fn welcome(lab: &Lab, address: SocketAddr, out: &Output) -> Result<(), Failure> {
    let ip = address.ip();
    let reachable = if ip.is_unspecified() { "127.0.0.1".to_owned() } else { authority(ip) };
    let url = format!("http://{reachable}:{}/", address.port());
    if !ip.is_loopback() {
        eprintln!(
            "sessionctl: lab: listens beyond this machine: whoever reaches {address} can run requests and release locks"
        );
    }
    if out.is_json() {
        let names: Vec<_> = lab.backends.iter().map(|backend| &backend.name).collect();
        out.object(&json!({"url": url, "backends": names}))?;
        return Ok(());
    }
    let labels: Vec<_> = lab.backends.iter().map(|backend| escape(backend.label())).collect();
    let dim = |text: &str| out.paint(Style::Dim, text.to_owned()).into_owned();
    out.raw(&format!("\n  The lab is open at {}\n", out.paint(Style::Bold, url.as_str())))?;
    out.raw(&format!("  {}   {}", dim("stores"), labels.join("\n           ")))?;
    out.raw(&format!("  {}   {}", dim("guard "), "answers this machine only, and no page but its own"))?;
    out.raw(&format!("  {}   Ctrl-C; sessionctl --help lists the other commands\n", dim("ends  ")))?;
    Ok(())
}
