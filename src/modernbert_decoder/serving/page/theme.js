// Light or dark: what the system prefers until the button is pressed. Runs before the page is drawn.
"use strict";

(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  let storage = null;
  try {
    storage = localStorage;
  } catch {
    // It is switched off: the choice lasts as long as the page.
  }
  const stored = storage?.getItem("theme");
  if (stored === "light" || stored === "dark") root.dataset.theme = stored;

  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const label = () => (button.textContent = isDark() ? "Light" : "Dark");
    label();
    system.addEventListener("change", label);
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      label();
      storage?.setItem("theme", root.dataset.theme);
    });
  });
})();
