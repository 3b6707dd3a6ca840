"""The page of a diagnosis looks like this in light and dark, on wide and narrow screens."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6677; --line: #dfe3ea; --paper: #ffffff; --page: #f4f5f8;
  --link: #2459b0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7ee; --soft: #9aa5b5; --line: #343b47; --paper: #1b2028; --page: #12151a; --link: #8fb7f5; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .4rem; }
.facts, .counts { color: var(--soft); margin: .4rem 0 .8rem; }
.counts { font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 0 0 1.2rem; font-size: .9rem; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 1.1rem 1.2rem;
  margin: 0 0 1.2rem; scroll-margin-top: 1rem; }
section > p { margin: .2rem 0 .6rem; max-width: 46rem; }
figure { margin: .8rem 0; overflow-x: auto; }
figure svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
th[scope=row] { text-align: left; font-weight: 500; position: sticky; left: 0; background: var(--paper);
  padding-left: 0; }
#how td { text-align: left; white-space: normal; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--link); font-size: .9rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .7rem 1.6rem;
  margin: 1rem 0 0; padding-top: .8rem; border-top: 1px solid var(--line); font-size: .875rem; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--soft); }
code { font: .85em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
dd .formula { display: block; margin-top: .2rem; color: var(--ink); }
sub, sup { font-size: .75em; line-height: 0; }
ul { margin: 0 0 .8rem; padding-left: 1.2rem; overflow-wrap: anywhere; font-size: .9rem; }
@media (max-width: 40rem) {
  main { padding: .8rem .5rem 3rem; }
  section { padding: .9rem .8rem; }
  h1 { font-size: 1.35rem; }
  th, td { padding: .25rem .5rem; }
  th[scope=row] { white-space: normal; min-width: 8rem; }
}
@media print { body { background: none; } nav { display: none; } section { break-inside: avoid; border: 0; } }
"""
