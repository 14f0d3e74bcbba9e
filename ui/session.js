// Sends the page's secret with every request to this server: where a browser blocks cookies in frames, it is what binds
// the session to this page. A reload keeps it; another tab has its own.
(() => {
  const name = 'playground-session';
  let secret = '';
  try { secret = sessionStorage.getItem(name) || ''; } catch { /* storage is blocked as well */ }
  if (!secret) {
    secret = [...crypto.getRandomValues(new Uint8Array(24))].map(byte => byte.toString(16).padStart(2, '0')).join('');
    try { sessionStorage.setItem(name, secret); } catch { /* this page load only */ }
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
