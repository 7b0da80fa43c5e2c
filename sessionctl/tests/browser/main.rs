//! The page of the lab in a browser: what it shows is what was measured, and everybody can use it, whatever they see or press.
//!
//! Every backend is there, on servers of its own. What the page shows is compared with what the server answers a program.

#![allow(clippy::unwrap_used, reason = "a helper of a test is part of the test")]

mod browser;
mod lab;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use conformance_tests::servers::{MariaDb, Memcached, Postgres, Redis};
use serde_json::{Value, json};
use thirtyfour::Key;

use browser::{Browser, Scheme};
use lab::Lab;

const STRATEGIES: [&str; 5] = ["no_lock", "exclusive", "early_release", "read_only", "merge"];
const PAGE: &str = include_str!("page.js");

fn start(dsns: &[String]) -> Lab {
    Lab::start(Path::new(env!("CARGO_BIN_EXE_sessionctl")), dsns)
}

async fn open(lab: &Lab, path: &str) -> Browser {
    let browser = Browser::open().await;
    browser.be(1440, Scheme::Light).await;
    browser.go(&format!("{}{path}", lab.url)).await;
    browser.until("document.body.dataset.ready").await;
    browser
}

/// Waits until the page shows what became of what is at its address.
async fn shown(browser: &Browser) {
    browser.until("document.querySelector('#result').dataset.shows === location.pathname + ' done'").await;
}

/// Runs what is chosen, and returns the numbers that the server has of it.
async fn run(browser: &Browser, lab: &Lab) -> Value {
    let before = browser.address().await;
    browser.click("#go").await;
    browser.until(&format!("location.href !== '{before}'")).await;
    shown(browser).await;
    let report = lab.numbers(&browser.address().await);
    assert_eq!(report["state"], "done", "{report}");
    report["runs"][0].clone()
}

/// Asserts that nothing was complained about, and nothing asked of anybody but the lab.
async fn quiet(browser: &Browser, lab: &Lab) {
    assert_eq!(browser.complaints().await, [""; 0]);
    let requests = browser.requests().await;
    let own = format!("{}/", lab.url);
    assert!(!requests.is_empty() && requests.iter().all(|url| url.starts_with(&own)), "{requests:?}");
}

async fn readable(browser: &Browser, width: u32, what: &str) {
    assert_eq!(browser.script(&format!("{PAGE} return pale();")).await, json!([]), "{what}");
    let wide = browser.script("return document.documentElement.scrollWidth").await;
    assert_eq!(wide, width, "{what}: the page is wider than the window");
}

/// Asserts that every bar begins and ends where the server measured it, to the pixel.
#[track_caller]
fn true_to(run: &Value, drawn: &Value) {
    let pixel = drawn["pixel"].as_f64().unwrap();
    let lanes = run["lanes"].as_array().unwrap();
    assert_eq!(drawn["lanes"].as_array().unwrap().len(), lanes.len());
    for (lane, drawn) in lanes.iter().zip(drawn["lanes"].as_array().unwrap()) {
        let at = |key: &str| lane[key].as_f64().unwrap();
        let bars = [("working", "work_began_us", "work_ended_us"), ("holding", "opened_us", "held_until_us")];
        for (kind, from, to) in bars.into_iter().filter(|(kind, ..)| *kind == "working" || lane["holds"] == true) {
            let bar = &drawn[kind][0];
            assert!((bar[0].as_f64().unwrap() - at(from)).abs() <= 2.0 * pixel, "{kind} {lane} {drawn} {pixel}");
            // A bar is never narrower than can be seen.
            assert!((bar[1].as_f64().unwrap() - at(to)).abs() <= 4.5 * pixel, "{kind} {lane} {drawn} {pixel}");
        }
        assert_eq!((&drawn["gone"], drawn["crosses"] == 1), (&lane["lost"], lane["lost"] == true), "{lane}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_strategy_on_every_backend_shows_what_was_measured_in_light_and_dark_on_a_desk_and_on_a_phone() {
    let place = tempfile::tempdir().unwrap();
    let (redis, postgres, mariadb) =
        (Redis::start(&[]).unwrap(), Postgres::start(&[]).unwrap(), MariaDb::start(&[]).unwrap());
    let memcached = Memcached::start(&[]).unwrap();
    let lab = start(&[
        format!("file://{}/files", place.path().display()),
        redis.url(),
        format!("{}?create=on", postgres.url()),
        format!("{}?create=on", mariadb.url()),
        format!("sqlite://{}/sessions.db?create=on", place.path().display()),
        memcached.url(),
        "memory://".into(),
    ]);
    assert_eq!(lab.backends, ["file", "redis", "postgres", "mysql", "sqlite", "memcache", "memory"]);
    let browser = open(&lab, "/").await;
    for (width, scheme) in [(1440, Scheme::Light), (1440, Scheme::Dark), (375, Scheme::Light), (375, Scheme::Dark)] {
        browser.be(width, scheme).await;
        browser.go(&lab.url).await;
        browser.until("document.body.dataset.ready").await;
        readable(&browser, width, "before the first run").await;
        browser.write("#requests", "12").await;
        browser.write("#works", "15").await;
        for backend in &lab.backends {
            browser.choose("#backend", backend).await;
            for strategy in STRATEGIES {
                let what = format!("{backend} {strategy} {width} {scheme:?}");
                browser.click(&format!("input[value='{strategy}']")).await;
                let run = run(&browser, &lab).await;
                assert_eq!(run["strategy"], strategy, "{what}");
                for (place, key) in [("#n-expected", "expected"), ("#n-found", "found"), ("#n-lost", "lost")] {
                    assert_eq!(
                        browser.script(&format!("return document.querySelector('{place}').textContent")).await,
                        run[key].to_string(),
                        "{what}"
                    );
                }
                assert_eq!(browser.text("#sentence").await, run["sentence"].as_str().unwrap(), "{what}");
                let lost = run["lost"].as_u64().unwrap();
                assert_eq!(lost > 0, strategy == "no_lock", "{what}: {}", run["sentence"]);
                assert_eq!(run["expected"].as_u64().unwrap() - run["found"].as_u64().unwrap(), lost, "{what}");
                true_to(&run, &browser.script(&format!("{PAGE} return drawn(document.querySelector('#lanes'));")).await);
                if backend == "file" {
                    readable(&browser, width, &what).await;
                }
            }
        }
        browser.click("#tab-compare").await;
        readable(&browser, width, "nothing compared").await;
        browser.click("#tab-sessions").await;
        for backend in &lab.backends {
            let what = format!("a lock on {backend} {width} {scheme:?}");
            browser.choose("#listed", backend).await;
            browser.click("#hold").await;
            browser.until("document.querySelector('#locks-status').textContent.startsWith('The lab holds')").await;
            browser.until("document.querySelector('#locks button')").await;
            readable(&browser, width, &what).await;
            let listing = lab.numbers(&format!("/sessions?backend={backend}"));
            let lock = listing["locks"].as_array().unwrap().iter().find(|lock| lock["ours"] == true).unwrap();
            let rows = browser.text("#locks").await;
            assert!(
                rows.contains(lock["handle"].as_str().unwrap()) && rows.contains(lock["holder"].as_str().unwrap()),
                "{what} {rows}"
            );
            browser.click(&format!("#locks button[data-handle='{}']", lock["handle"].as_str().unwrap())).await;
            browser.until("document.querySelector('#locks-status').textContent.startsWith('The lab gave it back')").await;
        }
        quiet(&browser, &lab).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_articles_case_is_compared_side_by_side_on_one_scale() {
    // Without syncs: whoever waits for a save would else wait for whatever the disk has to do.
    let place = tempfile::tempdir().unwrap();
    let lab = start(&[format!("file://{}/sessions?durability=none", place.path().display())]);
    let browser = open(&lab, "/compare").await;
    for (width, scheme) in [(1440, Scheme::Light), (375, Scheme::Dark)] {
        browser.be(width, scheme).await;
        let before = browser.address().await;
        browser.click("[data-preset='article']").await;
        browser.until(&format!("location.href !== '{before}'")).await;
        shown(&browser).await;
        let report = lab.numbers(&browser.address().await);
        assert_eq!(report["plan"], json!({"works_ms": [20, 30, 25, 10], "apart_ms": 0}));
        let rows = browser
            .script("return [...document.querySelectorAll('#compare-table tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent))")
            .await;
        let mut waits = Vec::new();
        for (row, run) in rows.as_array().unwrap().iter().zip(report["runs"].as_array().unwrap()) {
            let ms = |key: &str| format!("{:.2} ms", run[key].as_f64().unwrap() / 1000.0);
            assert_eq!(row[0], run["title"]);
            // Both round, and may not agree on a half.
            let close = |shown: &Value, key: &str| {
                let shown: f64 = shown.as_str().unwrap().trim_end_matches(" ms").replace(',', "").parse().unwrap();
                assert!((shown * 1000.0 - run[key].as_f64().unwrap()).abs() <= 5.5, "{row} {}", ms(key));
            };
            close(&row[1], "total_us");
            close(&row[2], "wait_last_us");
            assert_eq!(row[4], format!("{} of {}", run["found"], run["expected"]));
            waits.push(run["wait_last_us"].as_u64().unwrap());
        }
        // Only under the lock does the fourth request wait for the other three.
        assert!(waits[1] >= 74_000 && [0, 2, 3, 4].iter().all(|at| waits[*at] < waits[1]), "{waits:?}");
        assert_eq!(
            browser.script("return document.querySelector('#compare-table thead th:nth-child(3)').textContent").await,
            "Request 4 waited"
        );
        let drawn = browser
            .script(&format!("{PAGE} return [...document.querySelectorAll('#compare-lanes .lanes')].map(drawn);"))
            .await;
        for (run, drawing) in report["runs"].as_array().unwrap().iter().zip(drawn.as_array().unwrap()) {
            assert_eq!((&drawing["marks"], &drawing["pixel"]), (&drawn[0]["marks"], &drawn[0]["pixel"]));
            true_to(run, drawing);
        }
        readable(&browser, width, "compared").await;
    }
    quiet(&browser, &lab).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_lanes_stay_apart() {
    let lab = start(&[]);
    let browser = open(&lab, "/").await;
    for width in [1440, 375] {
        browser.be(width, Scheme::Light).await;
        browser.click("input[value='no_lock']").await;
        browser.write("#requests", "200").await;
        browser.write("#works", "20").await;
        let run = run(&browser, &lab).await;
        true_to(&run, &browser.script(&format!("{PAGE} return drawn(document.querySelector('#lanes'));")).await);
        let gaps = browser
            .script(
                "const bars = [...document.querySelectorAll('#lanes g.lane')].map((lane) => lane.querySelector('.working').getBoundingClientRect()); \
                 return bars.slice(1).map((bar, at) => bar.top - bars[at].bottom)",
            )
            .await;
        assert!(gaps.as_array().unwrap().iter().all(|gap| gap.as_f64().unwrap() >= 1.0), "{gaps}");
        let labels = "[...document.querySelectorAll('#lanes text.n')].map((text) => text.getBoundingClientRect())";
        let overlaps = browser
            .script(&format!(
                "const all = {labels}; return all.slice(1).filter((text, at) => text.top < all[at].bottom - 3).length"
            ))
            .await;
        assert_eq!(overlaps, 0);
        readable(&browser, width, "200 lanes").await;
    }
    quiet(&browser, &lab).await;
}

/// Presses Tab until the focus is on what matches, and asserts that whoever looks sees where it is.
async fn tab_to(browser: &Browser, css: &str) {
    for _ in 0..60 {
        browser.press(Key::Tab).await;
        let visible = browser
            .script(
                "const at = document.activeElement; if (at === document.body) return true; \
                 const marked = (element) => { const style = getComputedStyle(element); return style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0; }; \
                 return marked(at) || Boolean(at.closest('.strategy') && marked(at.closest('.strategy')))",
            )
            .await;
        let on = browser.script("return document.activeElement.outerHTML.slice(0, 120)").await;
        assert_eq!(visible, true, "the focus cannot be seen on {on}");
        if browser.script(&format!("return document.activeElement.matches(\"{css}\")")).await == true {
            return;
        }
    }
    panic!("the Tab key never leads to {css}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_can_be_done_by_the_keyboard_alone() {
    let lab = start(&[]);
    let browser = open(&lab, "/").await;
    tab_to(&browser, ".skip").await;
    tab_to(&browser, "#theme").await;
    browser.press(Key::Enter).await;
    browser.until("document.querySelector('#theme').textContent === 'Theme: light'").await;
    tab_to(&browser, "input[value='no_lock']").await;
    browser.press(Key::Down).await;
    assert_eq!(browser.script("return document.querySelector('input[name=strategy]:checked').value").await, "exclusive");
    tab_to(&browser, "#backend").await;
    browser.press(Key::Down).await;
    assert_eq!(browser.script("return document.querySelector('#backend').value").await, "sqlite");
    tab_to(&browser, "#requests").await;
    browser.overtype("6").await;
    tab_to(&browser, "#works").await;
    browser.overtype("10").await;
    tab_to(&browser, "#go").await;
    browser.press(Key::Enter).await;
    browser.until("document.querySelector('#n-found').textContent === '6'").await;
    // The focus stays on the button, to run it again.
    assert_eq!(browser.script("return document.activeElement.id").await, "go");
    let report = lab.numbers(&browser.address().await);
    assert_eq!((&report["backend"], &report["runs"][0]["strategy"]), (&json!("sqlite"), &json!("exclusive")));
    tab_to(&browser, "#lanes").await;
    browser.press(Key::Down).await;
    browser.press(Key::Down).await;
    let told = browser.script("return document.querySelector('#lanes').getAttribute('aria-valuetext')").await;
    assert!(told.as_str().unwrap().starts_with("Request 2 waited"), "{told}");
    assert_eq!(browser.text("#readout").await, told.as_str().unwrap());
    tab_to(&browser, "#all summary").await;
    browser.press(Key::Enter).await;
    browser.until("document.querySelectorAll('#lane-table tbody tr').length === 6").await;
    browser.script("document.querySelector('.skip').focus()").await;
    tab_to(&browser, "#tab-run").await;
    browser.press(Key::Right).await;
    assert_eq!(browser.script("return document.activeElement.id").await, "tab-compare");
    tab_to(&browser, "[data-preset='article']").await;
    browser.press(Key::Enter).await;
    browser.until("document.querySelectorAll('#compare-table .good').length === 4").await;
    browser.script("document.querySelector('.skip').focus()").await;
    tab_to(&browser, "#tab-compare").await;
    browser.press(Key::End).await;
    assert_eq!(browser.script("return document.activeElement.id").await, "tab-sessions");
    tab_to(&browser, "#hold").await;
    browser.press(Key::Enter).await;
    browser.until("document.querySelector('#locks button')").await;
    tab_to(&browser, "#locks button").await;
    browser.press(Key::Enter).await;
    browser.until("document.querySelector('#locks-status').textContent.startsWith('The lab gave it back')").await;
    quiet(&browser, &lab).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_hears_the_page_is_told_what_everything_is() {
    let lab = start(&[]);
    let browser = open(&lab, "/").await;
    run(&browser, &lab).await;
    for (tab, width) in [("run", 1440), ("compare", 1440), ("sessions", 1440), ("sessions", 375)] {
        browser.be(width, Scheme::Light).await;
        browser.click(&format!("#tab-{tab}")).await;
        browser.until("document.querySelector('#panel-sessions').hidden || document.querySelector('#sessions tbody')").await;
        let tree = browser.ask("Accessibility.getFullAXTree", json!({})).await;
        let nodes: Vec<_> = tree["nodes"].as_array().unwrap().iter().filter(|node| node["ignored"] == false).collect();
        let role = |node: &Value| node["role"]["value"].as_str().unwrap_or_default().to_owned();
        let name = |node: &Value| node["name"]["value"].as_str().unwrap_or_default().to_owned();
        let named: Vec<_> = nodes.iter().map(|node| (role(node), name(node))).collect();
        for (role, name) in &named {
            let speaks = [
                "button",
                "link",
                "tab",
                "tablist",
                "tabpanel",
                "radio",
                "combobox",
                "textbox",
                "spinbutton",
                "slider",
                "checkbox",
                "region",
                "form",
            ];
            assert!(
                !speaks.contains(&role.as_str()) || !name.trim().is_empty(),
                "{tab}: a {role} without a name: {named:?}"
            );
        }
        let count = |wanted: &str| named.iter().filter(|(role, _)| role == wanted).count();
        assert_eq!(
            (count("tab"), count("tablist"), count("main"), count("banner"), count("contentinfo")),
            (3, 1, 1, 1, 1),
            "{tab}"
        );
        assert_eq!((count("tabpanel"), count("heading") > 0, count("status")), (1, true, 1), "{tab} {named:?}");
        let selected: Vec<_> = nodes
            .iter()
            .filter(|node| {
                node["properties"]
                    .as_array()
                    .is_some_and(|all| all.iter().any(|one| one["name"] == "selected" && one["value"]["value"] == true))
            })
            .filter(|node| role(node) == "tab")
            .map(|node| name(node))
            .collect();
        assert_eq!(selected.len(), 1, "{selected:?}");
        if tab == "run" {
            assert_eq!((count("slider"), count("radio"), count("figure")), (1, 5, 1), "{named:?}");
            for group in ["How each request opens the session", "Ready-made runs"] {
                assert!(named.contains(&("group".into(), group.into())), "{named:?}");
            }
            assert!(named.contains(&("radio".into(), "No lock".into())), "{named:?}");
        }
        if tab == "sessions" {
            assert_eq!(count("table"), 2, "{width} {named:?}");
        }
        let twice = browser.script("const ids = [...document.querySelectorAll('[id]')].map((one) => one.id); return ids.length - new Set(ids).size").await;
        assert_eq!(twice, 0, "an id stands for two elements");
    }
    assert_eq!(browser.script("return document.documentElement.lang").await, "en");
    quiet(&browser, &lab).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn markup_in_a_store_or_in_its_name_is_text() {
    const MARKUP: &str = "<img src=x onerror=document.title='broken'>";
    let redis = Redis::start(&[]).unwrap();
    let place = tempfile::tempdir().unwrap();
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    // As a lock stands in Redis, by a holder who calls himself something.
    let lock = format!("{}|60000|{since}|session:wake:1@{MARKUP}#x", "a".repeat(32));
    redis.command(&["SET", &format!("session:{{{}}}:lock", "b".repeat(32)), &lock, "PX", "60000"]).unwrap();
    let lab = start(&[redis.url(), format!("file://{}/{}", place.path().display(), "%3Cimg%20src=x%20onerror=alert(1)%3E")]);
    assert!(lab.numbers("/sessions?backend=redis")["locks"][0]["holder"].as_str().unwrap().contains(MARKUP));
    let browser = open(&lab, "/sessions").await;
    browser.until("document.querySelector('#locks button')").await;
    assert!(browser.text("#locks").await.contains(MARKUP));
    browser.go(&format!("{}/runs/%3Cimg%20src=x%20onerror=alert(1)%3E", lab.url)).await;
    assert!(browser.text("body").await.contains("not_found"));
    // The address that is not there is the only thing to complain about.
    let complaints = browser.complaints().await;
    assert!(complaints.iter().all(|complaint| complaint.contains("404")), "{complaints:?}");
    browser.go(&format!("{}/sessions", lab.url)).await;
    browser.until("document.querySelector('#locks button')").await;
    assert_eq!(
        browser.script("return [document.images.length, document.title.includes('broken')]").await,
        json!([0, false])
    );
    browser.choose("#listed", "file").await;
    browser.click("#tab-run").await;
    browser.choose("#backend", "file").await;
    assert_eq!(run(&browser, &lab).await["state"], "done");
    assert_eq!(browser.script("return document.images.length").await, 0);
    quiet(&browser, &lab).await;
}

/// Serves one page to anybody, from an origin of its own.
fn elsewhere(page: String) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, page) = (stream.unwrap(), page.clone());
            // A browser also opens connections that it asks nothing on.
            std::thread::spawn(move || {
                if stream.read(&mut [0; 4096]).is_ok() {
                    let head = format!(
                        "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\ncontent-length: {}",
                        page.len()
                    );
                    let _ = write!(stream, "{head}\r\n\r\n{page}");
                }
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_from_elsewhere_reads_nothing_changes_nothing_and_frames_nothing() {
    let lab = start(&[]);
    let url = &lab.url;
    let token = lab.numbers("/")["token"].as_str().unwrap().to_owned();
    // It even has the token, which it could not have.
    let page = format!(
        "<!doctype html><title>elsewhere</title><iframe id=frame src='{url}/'></iframe><form id=form method=post action='{url}/runs' target=hidden enctype='text/plain'>\
         <input name='{{\"backend\":\"file\",\"strategy\":\"no_lock\",\"requests\":1,\"work_ms\":1,\"x\":\"' value='\"}}'></form><iframe name=hidden></iframe>\
         <script>window.results = {{}};\
         const wish = JSON.stringify({{backend: 'file', strategy: 'no_lock', requests: 1, work_ms: 1}});\
         const attempt = (name, address, options) => fetch(address, options).then(async (answer) => {{ results[name] = answer.type === 'opaque' ? 'blind' : (await answer.text()).slice(0, 60); }}, () => {{ results[name] = 'refused'; }});\
         Promise.all([\
           attempt('read', '{url}/?format=json'), attempt('sessions', '{url}/sessions?format=json', {{credentials: 'include'}}),\
           attempt('simple', '{url}/runs', {{method: 'POST', mode: 'no-cors', headers: {{'content-type': 'text/plain'}}, body: wish}}),\
           attempt('token', '{url}/runs', {{method: 'POST', headers: {{'content-type': 'application/json', 'x-lab-token': '{token}'}}, body: wish}}),\
           attempt('script', '{url}/lab.js', {{mode: 'no-cors'}}),\
         ]).then(() => {{ document.getElementById('form').submit(); setTimeout(() => {{ window.finished = true; }}, 500); }});\
         </script>"
    );
    let port = elsewhere(page);
    let browser = Browser::open().await;
    // Another port of the same host is the same site, and another host is another one.
    for host in ["127.0.0.1", "localhost", "evil.localhost"] {
        browser.go(&format!("http://{host}:{port}/")).await;
        browser.until("window.finished").await;
        let results = browser.script("return results").await;
        for name in ["read", "sessions", "token"] {
            assert_eq!(results[name], "refused", "{host}: {results}");
        }
        // What it may send without asking it does not see the answer of; the browser withholds even that.
        assert!(results["simple"] == "blind" || results["simple"] == "refused", "{host}: {results}");
        assert_eq!(results["script"], "refused", "{host}: {results}");
        let framed = browser
            .script("try { return document.getElementById('frame').contentDocument?.title ?? null } catch { return null }")
            .await;
        assert_eq!(framed, Value::Null, "{host}");
        assert_eq!(lab.numbers("/")["busy"], false);
        assert!(!lab.has("/runs/1") && !lab.has("/compare/1"), "{host}: a run was started from elsewhere");
    }
    // A name of somebody else's that leads here.
    browser.go(&format!("http://evil.localhost:{}/", lab.port())).await;
    assert!(browser.text("body").await.contains("foreign_host"));
}
