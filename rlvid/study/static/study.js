// Keys for those who like them: 1, 2, 3 answer the marked question, Backspace goes back, Enter saves.
"use strict";
const form = document.querySelector("form.judge");
const questions = [...form.querySelectorAll(".question")];
const shortcuts = document.getElementById("shortcuts");
const still = document.getElementById("still");
const images = [...document.querySelectorAll(".videos img")];
const answered = (question) => question.querySelector("input:checked") !== null;

let current = 0;
const mark = (index) => {
  current = index;
  questions.forEach((question, i) => question.classList.toggle("current", i === index));
};
questions.forEach((question, i) => {
  question.addEventListener("focusin", () => mark(i));
  question.addEventListener("click", () => mark(i));
});
mark(0);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (event.key === "Enter" && !event.target.closest("a, button")) {
    event.preventDefault();
    form.requestSubmit();
  }
  if (!shortcuts.checked) return;
  if ("123".includes(event.key)) {
    const choice = questions[current].querySelectorAll("input")[Number(event.key) - 1];
    choice.checked = true;
    choice.focus();
    const open = questions.findIndex((question) => !answered(question));
    if (open >= 0) mark(open);
  } else if (event.key === "Backspace") {
    event.preventDefault();
    mark(Math.max(0, current - 1));
    (questions[current].querySelector("input:checked") ?? questions[current].querySelector("input")).focus();
  }
});

// A second Enter or click while the first is on its way must not send the form again.
form.addEventListener("submit", (event) => {
  if (form.dataset.sent) event.preventDefault();
  form.dataset.sent = "yes";
});
window.addEventListener("pageshow", () => delete form.dataset.sent);

shortcuts.checked = localStorage.getItem("shortcuts") !== "off";
shortcuts.addEventListener("change", () => localStorage.setItem("shortcuts", shortcuts.checked ? "on" : "off"));

still.hidden = shortcuts.parentElement.hidden = false;
still.addEventListener("click", () => {
  const hold = still.getAttribute("aria-pressed") !== "true";
  still.setAttribute("aria-pressed", String(hold));
  const film = document.querySelector(".videos").dataset.film;
  images.forEach((image) => (image.src = film + (hold ? "&still=true" : "")));
});
const trouble = document.getElementById("trouble");
const broken = (image) => image.complete && !image.naturalWidth;
images.forEach((image) => image.addEventListener("error", () => (trouble.hidden = false)));
if (images.some(broken)) trouble.hidden = false;
