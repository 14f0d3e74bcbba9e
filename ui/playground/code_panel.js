// The panel "Use from code": shows the code of props.value.code for one client, and asks for it again when a control has
// changed, if the panel is open. All text is set with textContent.

const WAIT_MS = 300, COPIED_MS = 1500;
const details = element.querySelector('details'), tabs = [...element.querySelectorAll('[role=tab]')];
const text = element.querySelector('.code-text'), copy = element.querySelector('.code-copy');
let client = tabs[0].dataset.client, timer = null;

/** Asks the server for the code, after the last of several changes. */
function write(delay) {
  clearTimeout(timer);
  if (!details.open) return;
  const address = location.origin + location.pathname.replace(/\/+$/, '');
  timer = setTimeout(() => trigger('write', {address}), delay);
}

function draw() {
  const value = props.value || {}, code = (value.code || {})[client] || '';
  for (const tab of tabs) {
    const selected = tab.dataset.client === client;
    tab.setAttribute('aria-selected', String(selected));
    tab.tabIndex = selected ? 0 : -1;
  }
  text.setAttribute('aria-labelledby', 'code-tab-' + client);
  if (text.textContent !== code) text.textContent = code;
  copy.disabled = !code;
  element.querySelector('.code-note').textContent = value.note || '';
}

function select(tab) {
  client = tab.dataset.client;
  draw();
}

async function copyText() {
  try {
    await navigator.clipboard.writeText(text.textContent);
    copy.textContent = 'Copied';
  } catch {   // browsers offer the clipboard to secure pages only
    getSelection().selectAllChildren(text);
    copy.textContent = 'Selected';
  }
  setTimeout(() => { copy.textContent = 'Copy'; }, COPIED_MS);
}

for (const [index, tab] of tabs.entries()) {
  tab.addEventListener('click', () => select(tab));
  tab.addEventListener('keydown', event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!step) return;
    const next = tabs[(index + step + tabs.length) % tabs.length];
    select(next);
    next.focus();
    event.preventDefault();
  });
}
copy.addEventListener('click', copyText);
details.addEventListener('toggle', () => write(0));
for (const name of ['playground-settings', 'playground-weights']) document.addEventListener(name, () => write(WAIT_MS));
watch('value', draw);
draw();
