"use strict";
// What a search is worth with the reader's own numbers, from the ranks that the page holds.
{
  const form = document.getElementById("users-form");
  const screen = Number(form.dataset.screen);
  const arms = JSON.parse(form.dataset.arms);
  const rows = [...form.querySelectorAll("tbody tr")];

  // The chance that fewer than a screen's pictures come before the right one, when so many do on
  // average: Poisson's, the limit of many pictures that each come before it by a small chance.
  function onScreen(mean) {
    let term = Math.exp(-mean);
    let total = 0;
    for (let before = 0; before < screen; before++) {
      total += term;
      term *= mean / (before + 1);
    }
    return Math.min(total, 1);
  }

  function byArm({ gallery, ahead }, pictures) {
    let queries = 0, looked = 0, found = 0;
    for (const [places, times] of ahead) {
      const before = places / (gallery - 1) * (pictures - 1);
      queries += times;
      looked += times * (1 + before);
      found += times * onScreen(before);
    }
    return [found / queries, looked / queries];
  }

  function show(value, digits, unit) {
    const text = value.toLocaleString("en", {
      minimumFractionDigits: digits, maximumFractionDigits: digits,
    });
    return text + unit;
  }

  function compute() {
    if (!form.checkValidity()) return;
    const { pictures, searches, seconds } = Object.fromEntries(
      [...form.elements].filter((one) => one.name).map((one) => [one.name, Number(one.value)]));
    const ways = arms.map((arm) => byArm(arm, pictures));
    ways.push([Math.min(1, screen / pictures), (pictures + 1) / 2]);
    ways.forEach(([found, looked], way) => {
      const cells = rows[way].querySelectorAll("output");
      cells[0].value = show(100 * found, 1, " %");
      cells[1].value = show(looked, 1, "");
      cells[2].value = show(looked * seconds, 1, " s");
      cells[3].value = show(looked * seconds * searches / 3600, 1, " h");
    });
  }

  form.addEventListener("input", compute);
  form.addEventListener("submit", (event) => event.preventDefault());
  compute();
}
