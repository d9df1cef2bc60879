// Keys, one vote a page, and two replies that scroll together. Without this script the page works by its buttons.
"use strict";
const form = document.getElementById("vote");
const undo = document.getElementById("undo");
const texts = [...document.querySelectorAll(".reply .scroll")];
let sent = false;

const question = document.querySelector(".prompt"); // of a long dialogue the end is what was asked
question.scrollTop = question.scrollHeight;

function choose(choice) {
  const button = form.querySelector(`button[value="${choice}"]`);
  if (!sent) button.click();
}

document.querySelectorAll("form").forEach((each) =>
  each.addEventListener("submit", (event) => {
    if (sent) event.preventDefault();
    sent = true;
  }),
);

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input")) return;
  const down = texts.includes(event.target) && event.target.scrollHeight > event.target.clientHeight ? "" : "tie";
  const choice = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: down, b: "both_bad" }[event.key];
  if (choice) {
    event.preventDefault();
    choose(choice);
  } else if (event.key === "u" && undo && !sent) {
    undo.click();
  }
});

texts.forEach((text) =>
  text.addEventListener("scroll", () => {
    const share = text.scrollTop / Math.max(1, text.scrollHeight - text.clientHeight);
    texts
      .filter((other) => other !== text && !text.led)
      .forEach((other) => {
        const top = Math.round(share * (other.scrollHeight - other.clientHeight));
        if (Math.abs(other.scrollTop - top) > 1) {
          other.led = true; // its own scroll event, which follows, leads nobody
          other.scrollTop = top;
        }
      });
    text.led = false;
  }),
);

// A page that comes back from the browser's memory shows a pair that is voted on
window.addEventListener("pageshow", (event) => event.persisted && location.reload());
