//! The pages of the examples work in a browser, on the file backend.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use axum::Router;
use sessionkit::Sessions;
use thirtyfour::{By, ChromiumLikeCapabilities, DesiredCapabilities, WebDriver};

#[allow(dead_code, reason = "its main is what `cargo run` starts")]
#[path = "../examples/cart.rs"]
mod cart;
#[allow(dead_code, reason = "its main is what `cargo run` starts")]
#[path = "../examples/dashboard.rs"]
mod dashboard;
#[allow(dead_code, reason = "its main is what `cargo run` starts")]
#[path = "../examples/login.rs"]
mod login;
#[allow(dead_code, reason = "its main is what `cargo run` starts")]
#[path = "../examples/slow_report.rs"]
mod slow_report;

/// A browser without a window at an example's page; both end with this value.
struct Page {
    driver: WebDriver,
    server: Child,
    _scratch: tempfile::TempDir,
}

impl Page {
    async fn open(app: impl FnOnce(Sessions) -> sessionkit::Result<Router>) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let store = format!("file://{}", scratch.path().join("sessions").display());
        let app = app(sessionkit::connect(&store).await.unwrap()).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await });

        let started = Command::new("chromedriver").arg("--port=0").stdout(Stdio::piped()).spawn();
        let mut server = started.expect("chromedriver starts; Debian has it in the package chromium-driver");
        let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
        let port = lines.find_map(|line| line.ok()?.split("started successfully on port ").nth(1).map(str::to_owned));
        let port = port.expect("chromedriver says where it listens").trim_end_matches('.').to_owned();
        // What it says later must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));

        let mut browser = DesiredCapabilities::chrome();
        let data = format!("--user-data-dir={}", scratch.path().join("browser").display());
        // Without a sandbox, as an account like root's may not have one; the page is ours.
        for arg in ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", &data] {
            browser.add_arg(arg).unwrap();
        }
        let driver = WebDriver::new(format!("http://127.0.0.1:{port}"), browser).await.expect("chromium starts");
        driver.goto(&url).await.unwrap();
        Self { driver, server, _scratch: scratch }
    }

    async fn text(&self, id: &str) -> String {
        self.driver.find(By::Id(id)).await.unwrap_or_else(|error| panic!("{id}: {error}")).text().await.unwrap()
    }

    async fn click(&self, id: &str) {
        self.driver.find(By::Id(id)).await.unwrap_or_else(|error| panic!("{id}: {error}")).click().await.unwrap();
    }

    async fn write(&self, name: &str, text: &str) {
        self.driver.find(By::Name(name)).await.unwrap().send_keys(text).await.unwrap();
    }

    /// Waits until an element says what is expected.
    async fn shows(&self, id: &str, expected: impl Fn(&str) -> bool) -> String {
        for _ in 0..200 {
            if let Ok(element) = self.driver.find(By::Id(id)).await
                && let Ok(text) = element.text().await
                && expected(&text)
            {
                return text;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{id} says: {}", self.text(id).await);
    }

    async fn close(self) {
        self.driver.clone().quit().await.unwrap();
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // The browser has ended before it, if all went well.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_login_lets_in_counts_and_lets_out() {
    let page = Page::open(login::app).await;
    page.write("name", "Ada <Lovelace>").await;
    page.write("password", "abracadabra").await;
    page.click("login").await;
    page.shows("notice", |text| text == "That is not the password.").await;
    page.write("name", "Ada <Lovelace>").await;
    page.write("password", "sesame").await;
    page.click("login").await;
    page.shows("user", |text| text == "Ada <Lovelace>").await;
    assert!(page.text("notice").await.contains("under a new id"));
    page.driver.refresh().await.unwrap();
    page.shows("pages", |text| text == "2").await;
    page.click("logout").await;
    page.shows("notice", |text| text == "Goodbye.").await;
    page.driver.refresh().await.unwrap();
    page.shows("login", |text| text == "Log in").await;
    page.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cart_has_all_that_was_added_at_once() {
    let page = Page::open(cart::app).await;
    page.shows("badge", |text| text == "0").await;
    page.click("ten").await;
    page.shows("badge", |text| text == "10").await;
    page.driver.find(By::Id("mode")).await.unwrap().send_keys("are merged").await.unwrap();
    page.click("ten").await;
    page.shows("badge", |text| text == "20").await;
    assert!(page.text("said").await.starts_with("Done"));
    page.click("empty").await;
    page.shows("badge", |text| text == "0").await;
    page.click("one").await;
    page.shows("badge", |text| text == "1").await;
    page.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slow_report_lets_others_work_if_it_releases_the_lock() {
    let page = Page::open(slow_report::app).await;
    page.shows("clicks", |text| text == "1").await;
    for (releases, clicks) in [(true, 2_u32), (false, 3)] {
        if !releases {
            page.click("release").await;
        }
        page.click("report").await;
        page.shows("made", |text| text == "…").await;
        page.click("click").await;
        page.shows("clicks", |text| text == clicks.to_string()).await;
        // The click was counted before the report was made, or had to wait for it.
        let made = page.text("made").await;
        assert_eq!(made == "…", releases, "{made}");
        page.shows("made", |text| text == format!("report {}", clicks - 1)).await;
    }
    page.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dashboard_shows_what_was_chosen_in_every_widget() {
    let page = Page::open(dashboard::app).await;
    page.shows("said", |text| text.starts_with("6 widgets")).await;
    assert_eq!(page.text("news").await, "news in gray");
    let milliseconds = |text: &str| text.split(' ').nth(3).unwrap().parse::<u32>().unwrap();
    page.click("green").await;
    page.shows("news", |text| text == "news in green").await;
    let side_by_side = page.shows("said", |text| text.starts_with("6 widgets")).await;
    assert_eq!(page.text("calendar").await, "calendar in green");
    page.click("locked").await;
    page.shows("said", |text| text == "loading").await;
    let in_turns = page.shows("said", |text| text.starts_with("6 widgets")).await;
    // Six times what each takes, under the lock.
    assert!(milliseconds(&in_turns) >= 6 * 300, "{in_turns}");
    assert!(milliseconds(&side_by_side) < milliseconds(&in_turns), "{side_by_side}");
    page.close().await;
}
