// Sends the page's secret with every request to this server: where a browser blocks cookies in frames, it is what binds
// the session to this page. A reload keeps it where storage is allowed; another tab has its own.
(() => {
  // Browsers that block cookies in frames block storage as well: reading window.localStorage raises an error there, with
  // which Gradio's page would not open. Memory replaces it until the page is closed.
  for (const storage of ['localStorage', 'sessionStorage']) {
    try { window[storage].getItem(''); continue; } catch { /* blocked */ }
    const items = new Map();
    Object.defineProperty(window, storage, {configurable: true, value: {
      getItem: key => items.get(String(key)) ?? null,
      setItem: (key, value) => { items.set(String(key), String(value)); },
      removeItem: key => { items.delete(String(key)); },
      clear: () => items.clear(),
      key: index => [...items.keys()][index] ?? null,
      get length() { return items.size; },
    }});
  }
  const name = 'playground-session';
  let secret = sessionStorage.getItem(name);
  if (!secret) {
    secret = [...crypto.getRandomValues(new Uint8Array(24))].map(byte => byte.toString(16).padStart(2, '0')).join('');
    try { sessionStorage.setItem(name, secret); } catch { /* storage is full: for this page load only */ }
  }
  const send = window.fetch;
  window.fetch = (input, options = {}) => {
    const request = input instanceof Request ? input : null;
    if (new URL(request ? request.url : input, location.href).origin !== location.origin) return send(input, options);
    const headers = new Headers(options.headers || (request ? request.headers : undefined));
    headers.set('x-playground-session', secret);
    return send(input, {...options, headers});
  };
})();
