// The code beside the paper's formulas is open; elsewhere a click opens it.
document.addEventListener("DOMContentLoaded", () => {
  if (!location.pathname.endsWith("/formulas.html")) return;
  document.querySelectorAll("details.mkdocstrings-source").forEach((details) => { details.open = true; });
});
