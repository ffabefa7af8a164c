// What scrolls sideways can be reached and moved with the keyboard, and landmarks have names.
const boxes = "pre, .table-wrapper, .cell_output .output, .math-wrapper";

function reachable() {
  for (const box of document.querySelectorAll(boxes)) {
    const wide = box.scrollWidth > box.clientWidth, high = box.scrollHeight > box.clientHeight;
    if (wide || high) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelector(".sidebar-drawer")?.setAttribute("aria-label", "Pages of the book");
  document.querySelector(".toc-drawer")?.setAttribute("aria-label", "On this page");
  reachable();
  addEventListener("resize", reachable);
});
