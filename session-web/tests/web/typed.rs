//! Sessions as structs of the application.

use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use session_web::{Mode, Result, Session, SessionLayer, SessionView, Typed};

use super::support::*;

#[derive(Default, Deserialize, Serialize)]
struct Cart {
    items: Vec<u32>,
}

impl Typed for Cart {
    const KEY: &'static str = "cart";
}

#[derive(Default, Deserialize, Serialize)]
struct Tour {
    step: u32,
}

impl Typed for Tour {
    const KEY: &'static str = "tour";
}

async fn add(session: Session<Cart>) -> Result<String> {
    let cart = session.update(|cart| cart.items.push(u32::try_from(cart.items.len()).unwrap())).await?;
    Ok(cart.items.len().to_string())
}

async fn step(session: Session<Tour>) -> Result<String> {
    let mut tour = session.get().await?;
    tour.step += 1;
    session.set(&tour).await?;
    Ok(tour.step.to_string())
}

async fn badge(cart: SessionView<Cart>, tour: SessionView<Tour>) -> Result<String> {
    Ok(format!("{} {}", cart.get().await?.items.len(), tour.get().await?.step))
}

async fn both(session: Session) -> Result<String> {
    session.insert("plain", &1).await?;
    let cart = session.typed::<Cart>();
    cart.update(|cart| cart.items.clear()).await?;
    let view = cart.release().await?;
    let empty = view.get().await?.items.is_empty();
    view.reopen().await?.update(|cart| cart.items.push(9)).await?;
    Ok(empty.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn structs_share_a_session_each_under_its_own_key() {
    for mode in [Mode::exclusive(), Mode::merge()] {
        let store = Counting::new();
        let router = pages().route("/add", post(add)).route("/step", post(step)).route("/badge", get(badge));
        let router = router.route("/both", post(both));
        let url = serve(router.layer(SessionLayer::new(store.sessions()).mode(mode))).await;
        let browser = browser();
        assert_eq!(text(&browser, format!("{url}/badge")).await, "0 0");
        post_ok(&browser, format!("{url}/count")).await;
        // Both change at once, and neither takes the other's place.
        for round in 1..21_u32 {
            let (cart, tour) =
                tokio::join!(post_ok(&browser, format!("{url}/add")), post_ok(&browser, format!("{url}/step")));
            assert_eq!((cart, tour), (round.to_string(), round.to_string()), "{mode:?}");
        }
        store.count();
        assert_eq!(text(&browser, format!("{url}/badge")).await, "20 20");
        assert_eq!(store.count(), 1, "two views of one request read once");
        assert_eq!(post_ok(&browser, format!("{url}/both")).await, "true");
        assert_eq!(text(&browser, format!("{url}/badge")).await, "1 20");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_in_a_merge_is_done_again_and_counts_each_time() {
    let router = pages().route("/add", post(add)).route("/badge", get(badge));
    let url = serve(router.layer(SessionLayer::new(sessions()).mode(Mode::merge()))).await;
    let browser = browser();
    post_ok(&browser, format!("{url}/count")).await;
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..40 {
        let (browser, url) = (browser.clone(), url.clone());
        all.spawn(async move { browser.post(format!("{url}/add")).send().await.unwrap().status() });
    }
    let mut added = 0;
    while let Some(status) = all.join_next().await {
        // Who loses too often is told so.
        added += usize::from(status.unwrap() == 200);
    }
    assert!(added > 1);
    assert_eq!(text(&browser, format!("{url}/badge")).await, format!("{added} 0"));
}
