//! A thousand visitors who do several things at once, while they log in and out.

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};

use axum::routing::post;
use reqwest::Client;
use session_core::{SessionId, Sessions};
use session_web::{Mode, Result, Session, SessionLayer};
use tokio::task::JoinSet;

use super::support::*;

const ROUNDS: usize = 1_000;
/// Rounds that go on side by side.
const LANES: usize = 4;

/// Everything that requests have met, by outcome.
#[derive(Debug, Default)]
struct Met {
    counted: u32,
    refused: u32,
    anew: u32,
}

/// Does all of `paths` at once with the jar of one browser; returns for each its status and text.
async fn at_once(browser: &Client, url: &str, paths: &[&str]) -> Vec<(u16, String)> {
    let mut requests = JoinSet::new();
    for (n, path) in paths.iter().enumerate() {
        let request = browser.post(format!("{url}/{path}")).send();
        requests.spawn(async move {
            let response = request.await.unwrap();
            (n, response.status().as_u16(), response.text().await.unwrap())
        });
    }
    let mut answers = vec![(0, String::new()); paths.len()];
    while let Some(answer) = requests.join_next().await {
        let (n, status, text) = answer.unwrap();
        answers[n] = (status, text);
    }
    answers
}

async fn round(url: &str, sessions: &Sessions, ids: &Mutex<Vec<SessionId>>, met: &mut Met) {
    let browser = browser();
    let first = browser.post(format!("{url}/count")).send().await.unwrap();
    let anonymous = id_in(&set_cookie(first.headers()));

    // Counting, in both ways, while the id changes twice: nothing is lost, and nobody gets another session.
    let answers = at_once(&browser, url, &["count", "rotate", "merge", "count", "rotate", "count"]).await;
    assert!(answers.iter().all(|(status, _)| *status == 200), "{answers:?}");
    assert_eq!(text(&browser, format!("{url}/read")).await, "5");
    let rotated = sessions.view(&anonymous).await.unwrap();
    assert_eq!(rotated.get::<u32>("n").unwrap(), Some(5), "the old id leads on");
    met.counted += 4;

    // A login in the middle. Who comes with the old id afterwards is refused aloud; what was accepted is there.
    let answers = at_once(&browser, url, &["count", "login", "count", "merge"]).await;
    assert_eq!(answers[1].0, 200, "{answers:?}");
    let counted = answers.iter().enumerate().filter(|(n, (status, _))| *n != 1 && *status == 200).count();
    assert!(answers.iter().all(|(status, _)| [200, 409].contains(status)), "{answers:?}");
    let n = 5 + u32::try_from(counted).unwrap();
    assert_eq!(text(&browser, format!("{url}/user")).await, "ada", "{answers:?}");
    assert_eq!(text(&browser, format!("{url}/read")).await, n.to_string(), "{answers:?}");
    met.refused += 3 - u32::try_from(counted).unwrap();
    for id in [&anonymous, rotated.id().unwrap()] {
        assert!(!sessions.view(id).await.unwrap().contains("user"), "an id from before the login sees none of it");
    }
    // The id of the login, to be looked for at the end.
    let id = browser.post(format!("{url}/id")).send().await.unwrap().text().await.unwrap();
    let id = SessionId::parse(&id).unwrap();

    // A rotate and a logout in the middle: it is over, for every id there ever was.
    let answers = at_once(&browser, url, &["count", "rotate", "logout", "merge", "count"]).await;
    assert_eq!(answers[2].0, 200, "{answers:?}");
    assert!(answers.iter().all(|(status, _)| [200, 409].contains(status)), "{answers:?}");
    assert_eq!(text(&browser, format!("{url}/user")).await, "nobody", "{answers:?}");
    assert!(!sessions.view(&id).await.unwrap().exists(), "it came back: {answers:?}");
    met.refused += u32::try_from(answers.iter().filter(|(status, _)| *status == 409).count()).unwrap();
    // Who came after it, without a session, has counted from one.
    let anew = [0, 3, 4].into_iter().filter(|n| answers[*n].0 == 200 && answers[*n].1.parse::<u32>().is_ok_and(|n| n < 5));
    met.anew += u32::try_from(anew.count()).unwrap();
    ids.lock().unwrap().push(id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_times_across_login_and_logout_nothing_is_lost_and_nobody_comes_back_or_is_put_out() {
    let merge = async |session: Session| -> Result<String> {
        let session = session.with(Mode::merge());
        session.update_key("n", |n: Option<u32>| n.unwrap_or(0) + 1).await?;
        tokio::task::yield_now().await;
        Ok(session.get("n").await?.unwrap_or(0_u32).to_string())
    };
    let id = async |session: Session| -> Result<String> { Ok(session.id().await?.unwrap().as_str().to_owned()) };
    let store = Counting::new();
    let layer = SessionLayer::new(store.sessions());
    let sessions = layer.sessions().clone();
    let url = serve(pages().route("/merge", post(merge)).route("/id", post(id)).layer(layer)).await;
    let ids = Arc::new(Mutex::new(Vec::new()));
    let mut lanes = JoinSet::new();
    for _ in 0..LANES {
        let (url, sessions, ids) = (url.clone(), sessions.clone(), ids.clone());
        lanes.spawn(async move {
            let mut met = Met::default();
            for _ in 0..ROUNDS / LANES {
                round(&url, &sessions, &ids, &mut met).await;
            }
            met
        });
    }
    let mut met = Met::default();
    while let Some(lane) = lanes.join_next().await {
        let lane = lane.unwrap();
        met = Met { counted: met.counted + lane.counted, refused: met.refused + lane.refused, anew: met.anew + lane.anew };
    }
    sessions.shutdown().await;
    assert_eq!(sessions.in_use(), (0, 0));
    // Long afterwards: not one of a thousand sessions that were logged out is there, under whatever id.
    let ids: HashSet<_> = ids.lock().unwrap().drain(..).collect();
    assert_eq!(ids.len(), ROUNDS);
    for id in &ids {
        assert!(!sessions.view(id).await.unwrap().exists());
    }
    let all = sessions.handler().admin().unwrap().list(None, NonZeroU32::MAX).await.unwrap().sessions;
    println!("{ROUNDS} rounds: {met:?}, {} records are left, none of them logged in", all.len());
    for info in all {
        assert!(!sessions.view(&info.id).await.unwrap().contains("user"));
    }
}
