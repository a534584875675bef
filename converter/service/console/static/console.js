// What the pages gain from a script: progress as it comes, lists that stay true, digests that are copied. All of them work without it.
"use strict";
(() => {
  const main = document.getElementById("main");
  document.documentElement.classList.add("js");

  // A notice belongs to one redirect: reloading does not say it again.
  const here = new URL(location.href);
  if (here.searchParams.has("done")) {
    here.searchParams.delete("done");
    history.replaceState(history.state, "", here);
  }

  const say = (text) => {
    const p = document.getElementById("say");
    if (p.textContent !== text) p.textContent = text;
  };

  // A selector of an element by which its successor is found after a part of the page was replaced.
  const selectorOf = (e) => {
    if (!e || !main.contains(e)) return "";
    if (e.id) return "#" + CSS.escape(e.id);
    if (e.hasAttribute("href")) return `a[href="${CSS.escape(e.getAttribute("href"))}"]`;
    if (e.dataset.copy) return `[data-copy="${CSS.escape(e.dataset.copy)}"]`;
    return "";
  };

  // Replaces the content of an element by what the page has there now; the focus stays where it was, or goes to the heading.
  const refresh = async (id) => {
    const answer = await fetch(location.href, { credentials: "same-origin", headers: { Accept: "text/html" } });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const old = document.getElementById(id), now = page.getElementById(id);
    if (answer.redirected || !now) {
      location.reload();
      return null;
    }
    if (old.innerHTML === now.innerHTML) return now;
    const focused = document.activeElement, within = focused !== old && old.contains(focused), selector = selectorOf(focused);
    document.title = page.title;
    old.replaceChildren(...now.cloneNode(true).childNodes);
    if (within) {
      const next = (selector && old.querySelector(selector)) || main.querySelector("h1");
      if (next.tagName === "H1") next.tabIndex = -1;
      next.focus({ preventScroll: true });
    }
    return now;
  };

  // Progress of an operation, which the server sends as the part of the page that shows it.
  const follow = (box) => {
    let source, ended = false;
    const open = () => {
      source = new EventSource(box.dataset.events);
      source.addEventListener("progress", (e) => {
        const part = new DOMParser().parseFromString(e.data, "text/html").body.firstElementChild;
        box.replaceChildren(part);
        say("Conversion: " + part.dataset.spoken);
      });
      source.addEventListener("end", async () => {
        ended = true;
        source.close();
        await refresh("main");
        follows();
      });
      source.addEventListener("error", () => {
        if (source.readyState === EventSource.CLOSED && !ended) setTimeout(() => refresh("main").then(follows), 5000);
      });
    };
    open();
    // A page that nobody looks at holds no connection.
    document.addEventListener("visibilitychange", () => {
      if (ended || !box.isConnected) return;
      source.close();
      if (!document.hidden) open();
    });
  };
  const followed = new WeakSet();
  const follows = () => {
    for (const box of document.querySelectorAll("[data-events]")) {
      if (!followed.has(box)) follow(box);
      followed.add(box);
    }
  };
  follows();

  // Lists in which something goes on.
  const list = document.querySelector("[data-refresh]");
  if (list) {
    const again = async () => {
      if (!document.hidden) {
        const now = await refresh(list.id).catch(() => list); // a server that is away comes back
        if (now && now.dataset.refresh === undefined) return;
      }
      setTimeout(again, 1000 * list.dataset.refresh);
    };
    setTimeout(again, 1000 * list.dataset.refresh);
  }

  const copy = async (text) => {
    if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
    const field = document.createElement("textarea"); // over plain HTTP there is no other way
    field.value = text;
    field.className = "hide";
    document.body.append(field);
    field.select();
    const ok = document.execCommand("copy");
    field.remove();
    if (!ok) throw new Error("not copied");
  };
  document.addEventListener("click", async (e) => {
    const button = e.target.closest("button.copy");
    if (!button) return;
    try {
      await copy(button.dataset.copy);
      button.focus();
      button.classList.add("copied");
      say("Copied");
      setTimeout(() => { button.classList.remove("copied"); say(""); }, 1600);
    } catch {
      say("Not copied: the browser does not allow it");
    }
  });

  // A form is sent once, however often its button is pressed.
  document.addEventListener("submit", (e) => {
    if (e.target.method !== "post") return;
    if (e.target.dataset.sent) e.preventDefault();
    e.target.dataset.sent = "1";
  });
  window.addEventListener("pageshow", (e) => {
    if (e.persisted) for (const form of document.forms) delete form.dataset.sent;
  });
})();
