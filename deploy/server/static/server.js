// Asks the server, and says what went wrong in words. Knows the key; knows nothing of the page.

export class Refused extends Error {
  // `status`: HTTP's, 0 where nobody answered. `seconds`: after so many it is worth trying again; null where it is not.
  constructor(message, status, seconds) {
    super(message);
    Object.assign(this, { status, seconds });
  }
}

const PASSING = new Set([408, 429, 500, 502, 503, 504]);

export const key = {
  get: () => sessionStorage.getItem("key"),
  set: (value) => sessionStorage.setItem("key", value),
  forget: () => sessionStorage.removeItem("key"),
};

export async function ask(path, { headers, ...options } = {}) {
  const mine = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  let reply;
  try {
    reply = await fetch(path, { ...options, headers: { ...headers, ...mine } });
  } catch {
    throw new Refused("The server does not answer. See that it runs, then try again.", 0, 0);
  }
  const body = await reply.json().catch(() => ({}));
  if (reply.ok) return body;
  const said = body.detail ?? `The server answered ${reply.status}.`;
  throw new Refused(said, reply.status, PASSING.has(reply.status) ? secondsOf(reply.headers.get("Retry-After")) : null);
}

// Seconds or a date (RFC 9110, 10.2.3).
function secondsOf(header) {
  const seconds = Number(header ?? 0);
  const wait = Number.isNaN(seconds) ? (Date.parse(header) - Date.now()) / 1000 : seconds;
  return Number.isFinite(wait) ? Math.max(0, Math.ceil(wait)) : 0;
}
